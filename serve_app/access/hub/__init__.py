"""Everything that speaks to a Hub, which may be slow, wrong or hostile.

probe.py           START HERE: can this process, with its token, read these weights?
steps.py           the questions that prove it, in order
subject.py         what is asked for, and what the Hub says of it
provenance.py      what a commit is besides its name: its license, its digest
classify.py        what an answer means: WHERE A 403 BECOMES `license_not_accepted`
mirror.py          what stands in for the Hub, and whether its files are the commit's
description.py     what the Hub says of a commit to everybody
client.py          requests with limits of time, bytes, redirects and retries
bounded_client.py  one connection at a time to a stranger
network.py         proxies and certificates of this process
exchange.py        exchanges an identity token for a Hub token
listing.py         what a commit consists of
model_files.py     which of its files are the model, and which are here
download.py        the files of a pinned commit
transfer.py        one file's bytes, resumed and checked (pace.py: how slow is too slow)
folders.py         a directory held open: nothing is written outside of it
chunk_store.py     the chunk store (Xet) as a way to the weights
xet.py             files from there, in a process that can be ended (xet_child.py)
"""
