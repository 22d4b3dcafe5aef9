"""What is lost when something breaks: a service on logical nodes, a steady load, one fault.

    __main__ ─► stage: nodes, Hub, service ─► load: streams ─► faults: strike, wait ─► report

Every fault has a cluster of its own and one file of results; the table is made of all of them.
"""
