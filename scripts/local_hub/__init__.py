"""A Hugging Face Hub on the loopback interface, for the quickstart and the tests.

It speaks the real protocol, so huggingface_hub and transformers work against it unmodified
(`HF_ENDPOINT`), and it treats every token as it is set to, at run time:

    with LocalHub([Repo("acme/tiny", files)]) as hub:
        token = hub.issue_token(Behaviour.pending)
        ...
        hub.set_behaviour(token, Behaviour.granted)

`python -m scripts.local_hub --help` runs it as a process of its own.

server.py      START HERE: LocalHub, the three origins as one context manager
hub.py         what huggingface.co answers: metadata for everybody, content for who has the grant
exchange.py    `/oauth/token`: identity tokens of trusted publishers for tokens of the Hub
mirrors.py     mirrors that answer in its place, with gaps
storage.py     the CDN behind signed URLs and the Xet store behind its tokens
behaviours.py  the ways to treat a token, the words of refusals, the accounts
answers.py     answers that need no repository: JSON, and what a sick Hub says
metadata.py    the JSON of accounts, models and listings
repos.py       repositories: commits, files and their hashes
state.py       what can change while it runs, and the log of requests
signing.py     signed URLs and read tokens
targets.py     from a path to what it asks for
wire.py        requests and answers as plain data
transport.py   sockets: uvicorn, and what is no HTTP
control.py     `/_local/...`, to control it from another process
model.py       the demo model as a directory; convert.py its weights
"""

from scripts.local_hub.behaviours import Behaviour, Route, fingerprint
from scripts.local_hub.repos import Repo
from scripts.local_hub.server import LocalHub
from scripts.local_hub.wire import HubRequest

__all__ = ["Behaviour", "HubRequest", "LocalHub", "Repo", "Route", "fingerprint"]
