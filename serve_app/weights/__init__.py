"""The weights on their way to a node: once per node, once per cluster, every byte verified.

fetch.py          START HERE: a pinned commit into this node's cache, from whoever has it
prefetch.py       the same on every node of a cluster, before a rollout
store.py          the cache: what is whole, what is missing
lock.py           one process of a node at a time
copies.py         copies that another tool made
provenance.py     what is about to be loaded, compared with `model.digest` and the signature
peers.py          the other nodes: who has it, who fetches it, their bytes over Ray
announcements.py  what nodes say of a commit to each other
chunks.py         what a node runs to hand out its files
"""
