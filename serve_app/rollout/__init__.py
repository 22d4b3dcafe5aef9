"""Rollouts from the command line: gate, apply, watch, ask, and back if it fails.

deploy.py        START HERE: one rollout from the gate to its end
plan.py          what it would do, line by line (diff.py: what differs and what Serve does about it)
scope.py         which applications it is about
serve_client.py  the Serve instance: its goal, its state, a question to it
canary.py        a release in steps beside the version that serves (judge.py: whether it is good)
progress.py      lines about replicas that start
history.py       what a rollback can go back to, by the rollout history in telemetry/
lock.py          one rollout of a cluster at a time
"""
