"""What is lost when something breaks: a service on logical nodes, a steady load, one fault.

In reading order:
    test_chaos  every measurement, with the marker `chaos`: deselected without `-m chaos`
    stage       nodes, Hub and service of one measurement, and what can be asked of them
    nodes       what a measurement needs, and its logical nodes
    load        a steady load of streams, and how each of them ended
    faults      faults of processes, and the list of all faults
    supply      faults of what replicas need: Hub, disks, caches, tokens, clocks
    moving      faults while the service changes: rollouts, growth
    rollouts    deploys and a rollback under load
    growth      scaling up after rollouts that did not go through
    attacks     one client that does what it should not
    starts      what starts cost: the Hub's bytes, a second replica's seconds
    inside      what runs inside Serve's own actors
    report      one JSON file for each measurement, and `results.md` of all of them

`scripts/chaos NAME...` runs some of them and `scripts/test -m chaos` all, which takes hours;
`python -m tests.chaos` writes `results.md` again from what was kept.
"""
