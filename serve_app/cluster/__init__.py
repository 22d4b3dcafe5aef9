"""All that this package asks of Ray beyond its public interface, and nothing else.

connection.py  a connection to a cluster that was named
placement.py   where replicas may go, and in which environment
application.py somebody else's application: built as Serve does, and where its deployments go
network.py     how nodes reach each other beside Ray: address and certificates
nodes.py       which nodes may host a replica: decisions, no Ray
tasks.py       one function run on those nodes
controller.py  what Serve's controller knows of the whole instance
kv.py          Ray's key-value store
liveness.py    which processes still write to it: decisions, no Ray
"""
