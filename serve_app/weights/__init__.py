"""The weights on their way to a node: once per node, once per cluster, every byte verified.

fetch.py          START HERE: a pinned commit into this node's cache, from whoever has it
prefetch.py       the same on every node of a cluster, before a rollout
store.py          the cache: what is whole, what is missing
lock.py           one process of a node at a time
copies.py         copies that another tool made
provenance.py     what is about to be loaded, compared with `model.digest` and the signature
from_hub.py       files from the Hub by this node alone
from_source.py    files from a source without commits (`model.url`)
partial.py        a file's pieces before it is whole, and the journal of what is here

peers.py          the other nodes: one commit's way through them, over Ray
taking.py         a node's part in a swarm: does what the swarm orders
swarm.py          who takes which piece from whom: the decisions alone
holdings.py       what they are made upon: who has what, who takes what, by whose word
editions.py       lists of hashes, and the nodes that take by them
pieces.py         a file cut into pieces, and what nodes and swarm say to each other
tracker.py        the swarms of a cluster in one actor
chunks.py         what a node runs to hand out its pieces
announcements.py  what nodes say of a commit, for as long as the cluster lives
lifetime.py       actors that every process finds, and that end when nobody uses them
"""
