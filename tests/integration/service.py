"""The application on a cluster of logical nodes, driven as its users drive it."""

import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.ports import free_port

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SERVING = {"role": "serving"}


@contextmanager
def meanwhile(act, *, every_s=0, clients=1):
    """Do something all the time in threads of its own; what began is ended."""
    over = threading.Event()

    def repeat():
        while not over.wait(every_s):
            act()

    threads = [threading.Thread(target=repeat) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


class Service:
    """One Serve instance on a cluster, deployed to as `serve run` does."""

    def __init__(self, hub, running, tokens):
        import ray
        from ray import serve

        self.port = free_port()
        self.hub, self.cluster, self.tokens = hub, running, tokens
        self.url = f"http://127.0.0.1:{self.port}"
        node: Any = ray._private.worker._global_node
        self.logs = Path(node.get_session_dir_path()) / "logs"
        serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port}
        )

    def config(self, *, served_name="smol", replicas=2, access=None, selector=None, overrides=None,
               engine=None, adapters=()):  # fmt: skip
        """Return the application's config; `overrides` change the LLM deployment."""
        args = {
            "model": {"repo_id": REPO, "served_name": served_name, "adapters": list(adapters)},
            "access": {"endpoint": self.hub.url, **(access or {})},
            "replica": {
                "num_gpus": 0,
                "num_cpus": 1,
                "label_selector": selector or SERVING,
                "min_replicas": replicas,
                "max_replicas": replicas,
            },
            "engine": {
                "max_context_tokens": 512,
                "max_running_requests": 16,
                "kv_cache_cpu_gib": 0.3,
                **(engine or {}),
            },
        }
        app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
        if overrides:
            app["deployments"] = [{"name": "LLMServer", **overrides}]
        return app

    def put(self, **config):
        """Hand a config to Serve, without waiting; see `config`."""
        self.put_app(self.config(**config))

    def put_app(self, app):
        """Hand any application to Serve, without waiting."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        schema = ServeDeploySchema.model_validate({"applications": [app]})
        _get_global_client().deploy_apps(schema, _blocking=False)

    def wait(self, *states, timeout_s=120):
        """Wait until the application reaches one of these states; returns its status."""
        from ray import serve

        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = serve.status().applications.get("llm")
            if status and status.status in states:
                return status
            time.sleep(0.1)
        raise AssertionError(f"not {states} within {timeout_s} s: {status}")

    def builds(self):
        """Return how many builds have begun; each writes a log of its own."""
        return len(list((self.logs / "serve").glob("controller_build_llm_*")))

    def wait_for_build(self, before, *states, timeout_s):
        """Wait until a build after the first `before` ones has ended in one of these states."""
        deadline = time.monotonic() + timeout_s
        while self.builds() <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.wait(*states, timeout_s=timeout_s)

    def metrics(self):
        """Return what Prometheus would scrape from all nodes."""
        import ray

        ports = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
        return "\n".join(httpx.get(f"http://127.0.0.1:{port}/metrics").text for port in ports)

    def client(self, kind=openai.OpenAI):
        return kind(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    def deploy(self, **config):
        """Hand a config to Serve and wait until it runs."""
        self.put(**config)
        status = self.wait("RUNNING", "DEPLOY_FAILED")
        assert status.status == "RUNNING", status.message

    def replicas(self):
        """Return the LLM deployment's replicas as (state, node's name)."""
        import ray
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

        names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        details = ray.get(controller.get_serve_instance_details.remote())
        deployment = details["applications"]["llm"]["deployments"]["LLMServer"]
        return [(r["state"], names.get(r.get("node_id"))) for r in deployment["replicas"]]

    @contextmanager
    def under_load(self, model="smol", *, clients=1, tokens=4, pause_s=0.1):
        """Ask all the time; yields the list of statuses so far, each request adds one.

        The pause between an answer and the next request leaves cores to what happens meanwhile.
        """
        answered = []

        def ask():
            try:
                client.chat.completions.create(model=model, messages=QUESTION, max_tokens=tokens)
                answered.append(200)
            except openai.APIError as error:
                answered.append(getattr(error, "status_code", 0))

        with self.client() as client, meanwhile(ask, every_s=pause_s, clients=clients):
            yield answered

    def logged(self, event, deployment="*"):
        """Return the log lines of an event as objects."""
        return [
            json.loads(line)
            for path in (self.logs / "serve").glob(f"replica_llm_{deployment}_*.log")
            for line in path.read_text(errors="replace").splitlines()
            if f'"event": "{event}"' in line and line.endswith("}")  # or a full disk cut it
        ]


def until(condition, timeout_s):
    """Wait for a condition; returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.1)
    return time.monotonic() - began
