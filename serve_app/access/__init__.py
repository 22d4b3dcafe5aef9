"""Which token a node uses, what the Hub answers to it, and the verdict over all nodes."""
