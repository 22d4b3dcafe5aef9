"""The `serve-app` command: one module a command, which parses, calls and prints.

main.py       START HERE: what each command calls
options.py    the options of every command
check.py      the gate without a rollout
deploy.py     `deploy` and `rollback`
canary.py     `deploy --canary`: a release in steps (release.py: what it is asked to do)
prefetch.py   the weights onto every node, after the gate and before a rollout
history.py    what gates, deploys and rollbacks decided
receipt.py    what each node has proven, under which license, since when
digest.py     what to write into `model.digest`
coldstart.py  the latest starts of every replica, by phase

`loadtest` and `capacity` are in serve_app/loadtest/command.py.
"""
