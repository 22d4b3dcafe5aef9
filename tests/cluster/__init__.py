"""The cluster package, without a cluster."""
