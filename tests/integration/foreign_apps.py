"""Applications that are not ours and call the gate first; the tests roll them out."""

from typing import Any

from ray import serve

from serve_app.gate import require_repo_access


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Plain:
    def __init__(self, commit):
        self.commit = commit

    def __call__(self):
        return self.commit


def plain(args):
    """Build a small application of somebody else."""
    deployment: Any = Plain
    return deployment.bind(require_repo_access(args["repo_id"], access=args["access"]))


class Front:
    def __init__(self, *loaders):
        self.loaders = loaders

    async def __call__(self):
        return " ".join([await loader.remote() for loader in self.loaders])


def two_loaders(args):
    """Build a front and two deployments, each with Ray options of its own."""
    deployment: Any = Plain
    loaders = [
        deployment.options(name=name, ray_actor_options={"num_cpus": 0, **args[name]}).bind(
            args["revision"]
        )
        for name in ("First", "Second")
    ]
    front: Any = serve.deployment(ray_actor_options={"num_cpus": 0})(Front)
    return front.bind(*loaders)


def llm(args):
    """Build an application of `ray.serve.llm`, which checks no access of its own."""
    commit = require_repo_access(args["repo_id"], access=args["access"])
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": "m", "model_source": args["repo_id"]},
        engine_kwargs={"revision": commit},
    )
    return build_openai_app({"llm_configs": [config]})
