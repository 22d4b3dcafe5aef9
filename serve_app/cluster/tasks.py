"""One function run on the nodes of the cluster where a replica may run."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.cluster.nodes import Lost, Node, eligible
from serve_app.cluster.placement import Placement, all_nodes, draining
from serve_app.redaction import sanitise

Answer = TypeVar("Answer")

RESULT_TIMEOUT_S = 5.0  # of an answer that has arrived; its owner may die in between
# A task for every node, full ones too, that is never repeated on another one.
node_task = ray.remote(num_cpus=0, num_gpus=0, max_retries=0)


class NodeTasks(Generic[Answer]):
    """Runs one function on the nodes that may host a replica, in the replicas' environment.

    Args:
        task: the function, made a `node_task`.
        kind: the class of its answers.
        placement: which nodes count, and the environment.
    """

    def __init__(self, task: Any, kind: type[Answer], placement: Placement) -> None:
        self._task = task
        self._kind = kind
        self._placement = placement

    def nodes(self) -> list[Node]:
        """Return the nodes that may host a replica now."""
        return eligible(all_nodes(), self._placement.demands, draining())

    def start(self, node: Node, *arguments: Any) -> ray.ObjectRef[Answer]:
        """Start the function on a node and return at once."""
        bound = self._task.options(
            # Hard: an answer of another node would be shown in this one's row.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            runtime_env=dict(self._placement.runtime_env) or None,
        )
        ref: ray.ObjectRef[Answer] = bound.remote(*arguments)
        return ref

    def wait(
        self, refs: list[ray.ObjectRef[Answer]], timeout_s: float
    ) -> list[ray.ObjectRef[Answer]]:
        """Return those that have ended, after the timeout at the latest."""
        # Not fetched: an answer whose node dies meanwhile would hold up those that are here.
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)
        return list(done)

    def result(self, ref: ray.ObjectRef[Answer]) -> Answer:
        """Return the answer of a task that has ended.

        Raises:
            Lost: the node, its worker or its environment failed.
        """
        try:
            answer = ray.get(ref, timeout=RESULT_TIMEOUT_S)
        except GetTimeoutError:
            raise Lost("the node answered and was lost before its answer arrived") from None
        except RayTaskError as error:
            kind = type(error.cause).__name__
            raise Lost(f"the probe could not run there ({kind}); is serve_app there?") from None
        except RayError as error:
            raise Lost(_loss(error)) from None
        # What comes is unpickled from another machine's package; its fields may be others.
        if not isinstance(answer, self._kind):
            raise Lost("another version of serve_app answered there")
        return answer

    def cancel(self, ref: ray.ObjectRef[Answer]) -> None:
        """Stop a task that nobody waits for any more."""
        # By force: a probe that hangs below Python does not see a polite request.
        ray.cancel(ref, force=True)

    def ask_all(self, *arguments: Any, timeout_s: float) -> list[tuple[Node, Answer | Lost]]:
        """Run the function everywhere at once; a silent or lost node costs its own answer only.

        Args:
            arguments: of the function.
            timeout_s: limit of all answers together.
        """
        refs = {node: self.start(node, *arguments) for node in self.nodes()}
        done = set(self.wait(list(refs.values()), timeout_s)) if refs else set()
        answers: list[tuple[Node, Answer | Lost]] = []
        for node, ref in refs.items():
            if ref not in done:
                self.cancel(ref)
                answers.append((node, Lost(f"no answer within {timeout_s:g} s")))
                continue
            try:
                answers.append((node, self.result(ref)))
            except Lost as lost:
                answers.append((node, lost))
        return answers


def _loss(error: RayError) -> str:
    if isinstance(error, TaskUnschedulableError | NodeDiedError):
        return "the node left the cluster during the check"
    if isinstance(error, WorkerCrashedError):
        return "the process of the probe died there (memory?)"
    first = str(error).strip().partition("\n")[0]
    return sanitise(f"{type(error).__name__}: {first}", limit=200)
