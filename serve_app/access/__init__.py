"""May this node read the weights? Each node proves it with its own token; all together decide.

preflight.py    START HERE: the gate before a rollout, over all nodes
collect.py      asks every node and gathers the answers under one deadline
node_check.py   what one node does: its probe, and a receipt for what it proved
hub/            everything that speaks to a Hub: probe, answers, listing, download
sources/        sources without commits, such as object stores: probe, listing, its digest
token.py        which token this process uses, and from where it came
shape.py        what can be seen of a token's value before it is sent
identity.py     the identity token of the node (access.identity), exchanged for a Hub token
notebook.py     why a notebook has no token although its user believes so
local.py        a model that is a directory on the node
license.py      the license a model states, its text, and whether the config allows it
digest.py       one hash for all files of a commit or a directory
signature.py    who signed the files, and which (bundle.py: the library that verifies it)
terms.py        what the config wants of a commit besides access
limited.py      work that may hang, ended in time
capacity.py     what this node can hold
verdict.py      outcomes of nodes, and the decision over all of them
remedies.py     one sentence for each outcome: what to do about it
report.py       the table that people read
receipt.py      what a node proved, when, under which license
statement.py    a receipt as a statement that other tools read (in-toto)
recheck.py      the grant while serving: asked again, shown, never acted upon
file_watch.py   files of tokens and keys on this node that change
"""
