"""The Serve instance of the connected cluster: its goal, its state, and a question to it.

Spoken to through Serve's own client and controller, as `serve run` does, and not through the
dashboard: a cluster that runs without one can be deployed to as well.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema, ServeInstanceDetails

from serve_app.cluster.controller import controller_client, instance_details
from serve_app.errors import ConfigError, ServeAppError
from serve_app.protocol import GenerationRequest, SamplingParams, TextPrompt, TokenDelta
from serve_app.serve_config import SERVER_DEPLOYMENT
from serve_app.telemetry import cold_start

CANARY = GenerationRequest(
    "canary", TextPrompt("Hello"), SamplingParams(max_tokens=4, temperature=0)
)
CANARY_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 30.0  # of Serve's controller; a restart of it takes less than ten


@dataclass(frozen=True, slots=True)
class AppState:
    """An application as Serve reports it.

    Args:
        status: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, …
        message: of the application, and the last line of each deployment's.
        deployed_s: when its present goal was set, on the controller's clock.
    """

    status: str
    message: str
    deployed_s: float


class Instance:
    """Serve on the connected cluster, started if it does not run.

    Args:
        goal: the file's content; its HTTP options count only when Serve is started here.
    """

    def __init__(self, goal: dict[str, Any]) -> None:
        schema = ServeDeploySchema.model_validate(goal)
        # It logs its own workings, as that Serve runs already, on a command's stderr.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(
            proxy_location=schema.proxy_location,
            http_options=schema.http_options.model_dump(),
        )
        self._client = controller_client()

    def goal(self) -> dict[str, Any] | None:
        """Return the applications that Serve is set to run, as a config; None for none.

        Raises:
            ConfigError: Serve's controller does not answer.
        """
        applications = _details()["applications"].values()
        found = [app.get("deployed_app_config") for app in applications]
        applications = [config for config in found if config]
        return {"applications": applications} if applications else None

    def apply(self, goal: dict[str, Any]) -> None:
        """Set the goal and return; Serve goes on by itself.

        The target capacity of the whole instance, in percent, stays where the goal says none.
        """
        if "target_capacity" not in goal:
            goal = goal | {"target_capacity": _details().get("target_capacity")}
        self._client.deploy_apps(ServeDeploySchema.model_validate(goal), _blocking=False)

    def states(self) -> dict[str, AppState]:
        """Return every application's state by name.

        Raises:
            ConfigError: Serve's controller does not answer.
        """
        status = ServeInstanceDetails(**_details())._get_status()
        return {
            name: AppState(
                status=str(getattr(app.status, "value", app.status)),
                message="\n".join(filter(None, [app.message, *_reasons(app)])),
                deployed_s=app.last_deployed_time_s,
            )
            for name, app in status.applications.items()
        }

    def phases(self, name: str) -> dict[str, cold_start.Phase]:
        """Return what each replica of an application is at that starts, or was killed in it."""
        return cold_start.running(name, since=0.0)

    def ask(self, name: str) -> str | None:
        """Let an application's model say a few tokens; returns what went wrong, or None."""
        # In a thread: Ray 2.60 has no time limit of a streaming answer.
        answers: queue.Queue[str | None] = queue.Queue()

        def ask() -> None:
            try:
                answers.put(_canary(name))
            except Exception as error:  # noqa: BLE001  whatever it is, the canary got no answer
                answers.put(f"{type(error).__name__}: the answer could not be read")

        threading.Thread(target=ask, daemon=True).start()
        try:
            return answers.get(timeout=CANARY_TIMEOUT_S)
        except queue.Empty:
            return f"no answer within {CANARY_TIMEOUT_S:g} s"


def _details() -> dict[str, Any]:
    try:
        return instance_details(ANSWER_TIMEOUT_S)
    except (RayError, ValueError) as error:
        kind = type(error).__name__
        raise ConfigError(f"Serve's controller does not answer ({kind})") from None


def _canary(name: str) -> str | None:
    handle: Any = serve.get_deployment_handle(SERVER_DEPLOYMENT, app_name=name)
    deltas = handle.options(stream=True).generate.remote(CANARY)
    tokens = 0
    try:
        for item in deltas:
            if isinstance(item, ServeAppError):
                return item.message
            if isinstance(item, TokenDelta):  # between them stand heartbeats
                tokens += len(item.token_ids)
    except (RayError, RayServeException) as error:
        return f"{type(error).__name__}: the replica did not answer"
    return None if tokens else "the model said nothing"


def _reasons(app: Any) -> list[str]:
    """Return the last line of each deployment's message; a traceback stands before it."""
    messages = [deployment.message.strip() for deployment in app.deployments.values()]
    return [message.splitlines()[-1] for message in messages if message]
