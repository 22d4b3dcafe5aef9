"""What is lost when something breaks: a service on logical nodes, a steady load, one fault.

test_chaos.py  every measurement, with the marker `chaos`: deselected without `-m chaos`
stage.py       nodes, Hub and service of one measurement, and what can be asked of them
nodes.py       what a measurement needs, and its logical nodes
load.py        a steady load of streams, and how each of them ended
faults.py      faults of processes, and the list of all faults
supply.py      faults of what replicas need: Hub, disks, caches, tokens, clocks
moving.py      faults while the service changes: rollouts, growth
rollouts.py    deploys and a rollback under load
growth.py      scaling up after rollouts that did not go through
attacks.py     one client that does what it should not
starts.py      what starts cost the Hub: bytes and requests by nodes
lines.py       how long weights take to eight nodes, each with a line of its own
inside.py      what runs inside Serve's own actors
report.py      one JSON file for each measurement, and `results.md` of all of them

`scripts/chaos NAME...` runs some of them and `scripts/test -m chaos` all, which takes hours;
`python -m tests.chaos` writes `results.md` again from what was kept.
"""
