"""A Hugging Face Hub on the loopback interface, for the quickstart and the tests.

It speaks the real protocol, so huggingface_hub and transformers work against it unmodified
(`HF_ENDPOINT`), and it treats every token as it is told, at run time:

    with LocalHub([Repo("acme/tiny", files)]) as hub:
        token = hub.issue_token(Behaviour.pending)
        ...
        hub.set_behaviour(token, Behaviour.granted)

`python -m scripts.local_hub --help` runs it as a process of its own.
"""

from scripts.local_hub.behaviours import Behaviour, Route, fingerprint
from scripts.local_hub.repos import Repo
from scripts.local_hub.server import LocalHub
from scripts.local_hub.wire import HubRequest

__all__ = ["Behaviour", "HubRequest", "LocalHub", "Repo", "Route", "fingerprint"]
