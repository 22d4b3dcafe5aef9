"""The Serve deployments of this package, and what they say to each other.

ingress.py        OpenAI's HTTP surface in front of the replicas; needs no GPU
engine_client.py  the replicas as an `LLMEngine`, over a Serve handle
split.py          two versions behind one ingress (canary.py: the share; track.py: one of them)
conversation.py   what the requests of a conversation have in common
prefix_router.py  which replica a request goes to, by its beginning
unrouted.py       what stands at the root of a canary, which nobody asks over HTTP
server.py         one replica, which is one engine
start.py          how it comes to that: libraries, weights, the engine
frames.py         all that a replica has for an ingress after a step, as one message
frame_sender.py   the replica's end of the connection that carries them
frame_receiver.py the ingress' end, and where a request's deltas arrive
parts.py          a long prompt's probabilities, in parts for either way
heartbeats.py     signs of life in a stream of Ray, where there is no such connection
jobs.py           work beside the requests, which begins again after a fault
autoscaling.py    how many replicas the load needs
files.py          files of tokens and keys that change: checked at once, and recorded
node_files.py     the same on nodes where no process of ours runs
shared_watch.py   the re-check of grants while serving: one for all ingresses
key_exchange.py   what ingresses tell each other of API keys' use, so that limits hold over all
grant_watch.py    the re-check beside somebody else's application, itself a small one
status.py         the application as a whole, for its status page
"""
