"""The Kubernetes manifests: valid by KubeRay's published schema, and true to the package.

The schema is that of KubeRay's `ray.io_rayservices.yaml`, version v1 (Apache-2.0), without its
descriptions.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

from serve_app import serve_config
from serve_app.access_config import AccessConfig
from serve_app.app import DRAIN_S
from serve_app.cli.main import RUNS
from serve_app.cli.options import parser_of

ROOT = Path(__file__).parent.parent.parent / "configs" / "kubernetes"
SCHEMA = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "rayservice-v1.schema.json.gz").read_bytes())
)
# Bytes of model.safetensors, as the Hub lists them.
WEIGHTS = {"meta-llama/Llama-3.2-1B-Instruct": 2_471_645_608}
KUSTOMIZATION = "kustomization.yaml"
UNITS = {"Mi": 2**20, "Gi": 2**30}
VARIANTS = ("base", "autoscaling", "air-gapped", "keyless")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def built(variant: str) -> dict[str, Any]:
    """Return the RayService as kustomize makes it: replacements and JSON patches applied."""
    service = read("base/rayservice.yaml")
    service["spec"]["serveConfigV2"] = (ROOT / "base/app.yaml").read_text()
    for patch in read(f"{variant}/kustomization.yaml").get("patches", ()):
        target = {"kind": service["kind"], "name": service["metadata"]["name"]}
        assert patch["target"] == target
        for change in yaml.safe_load(patch["patch"]):
            apply(service, change)
    return service


def apply(document: Any, change: dict[str, Any]) -> None:
    """Apply one operation of RFC 6902; a path that is not there is an error."""
    *parents, last = change["path"].lstrip("/").split("/")
    for part in parents:
        document = document[int(part) if isinstance(document, list) else part]
    key = int(last) if isinstance(document, list) else last
    if change["op"] == "replace":
        document[key]  # raises if it is not there
    else:
        assert change["op"] == "add"
        assert key not in document
    document[key] = change["value"]


def strict(schema: Any) -> Any:
    """Refuse unknown fields: the API server would drop them without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if known and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.fixture(params=VARIANTS)
def service(request):
    return built(request.param)


@pytest.fixture
def group(service):
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return group


@pytest.fixture
def app(tmp_path):
    path = tmp_path / "app.yaml"
    path.write_text((ROOT / "base/app.yaml").read_text())
    (app,) = serve_config.read(path)
    return app


def test_service_is_valid(service):
    """KubeRay's own schema, unknown fields refused."""
    schema = strict(SCHEMA)
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft202012Validator(schema).validate(service)
    broken = copy.deepcopy(service)
    broken["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["gropName"] = "gpu"
    with pytest.raises(jsonschema.ValidationError, match="gropName"):
        jsonschema.Draft202012Validator(schema).validate(broken)


def test_kustomization_names_what_exists():
    """Resources, the generated map, the replacement and the images exist."""
    kustomization = read("base/kustomization.yaml")
    for name in [*kustomization["resources"], *kustomization["configurations"]]:
        assert (ROOT / "base" / name).is_file()
    (generated,) = kustomization["configMapGenerator"]
    assert generated["files"] == ["app.yaml"]
    (replacement,) = kustomization["replacements"]
    assert replacement["source"]["name"] == generated["name"]
    assert replacement["targets"][0]["select"] == {"kind": "RayService", "name": "serve-app"}
    assert [image["name"] for image in kustomization["images"]] == ["serve-app"]
    for variant in VARIANTS[1:]:
        resources = read(f"{variant}/kustomization.yaml")["resources"]
        assert resources[0] == "../base"
        assert all((ROOT / variant / name).is_file() for name in resources[1:])


def test_gate_of_a_pod_runs_a_command_that_exists(group):
    """A renamed flag would leave every pod waiting for ever."""
    (container,) = group["template"]["spec"]["initContainers"]
    program, *arguments = container["command"]
    options = parser_of(RUNS).parse_args(arguments)
    assert program == "serve-app"
    assert options.this_node is True
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(options.config.parent) in mounted


def test_plain_vllm_gets_a_proven_directory_and_no_token():
    """The gate fetches into the volume that vLLM reads; the secret is the gate's alone."""
    deployment, _ = yaml.safe_load_all((ROOT / "plain-vllm/deployment.yaml").read_text())
    spec = deployment["spec"]["template"]["spec"]
    (gate,), (vllm,) = spec["initContainers"], spec["containers"]
    program, *arguments = gate["command"]
    options = parser_of(RUNS).parse_args(arguments)
    assert program == "serve-app"
    assert options.this_node is True
    assert vllm["args"][0] == str(options.link)
    folders = {mount["name"]: mount["mountPath"] for mount in gate["volumeMounts"]}
    assert options.link.is_relative_to(folders["weights"])
    assert {"name": "HF_HOME", "value": folders["weights"]} in gate["env"]
    assert {mount["name"] for mount in vllm["volumeMounts"]}.isdisjoint({"huggingface", "config"})
    (app,) = serve_config.read(ROOT / "plain-vllm/gate.yaml")
    assert str(Path(app.config.access.token_file).parent) == folders["huggingface"]
    assert options.config.name == "gate.yaml"
    kustomization = read("plain-vllm/kustomization.yaml")
    assert {image["name"] for image in kustomization["images"]} == {gate["image"], vllm["image"]}
    assert kustomization["configMapGenerator"][0]["name"] in json.dumps(spec["volumes"])
    for container in (gate, vllm):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {m["name"] for m in container["volumeMounts"]} <= {
            v["name"] for v in spec["volumes"]
        }


def test_node_label_is_what_the_replicas_ask_for(group, app):
    """A replica goes nowhere but to a node that passed its gate."""
    assert app.config.replica.label_selector == group["labels"]
    assert "labels" not in group["rayStartParams"]  # KubeRay refuses them there since 1.5


def documented_access(variant: str) -> dict[str, Any]:
    """Return the `access:` that a variant's head says app.yaml has."""
    (line,) = re.findall(r"^# +(access: .*)$", (ROOT / variant / KUSTOMIZATION).read_text(), re.M)
    return dict(yaml.safe_load(line)["access"])


def test_keyless_pods_mount_an_identity_token_and_no_secret():
    """What the head says app.yaml has is mounted where it says, for the Hub and nobody else."""
    access = AccessConfig(**documented_access("keyless"))
    _, worker = pods(built("keyless"))
    (account,) = yaml.safe_load_all((ROOT / "keyless/account.yaml").read_text())
    assert worker["serviceAccountName"] == account["metadata"]["name"]
    assert worker["automountServiceAccountToken"] is False
    assert not any("secret" in volume for volume in worker["volumes"])
    (volume,) = (volume for volume in worker["volumes"] if "projected" in volume)
    (source,) = volume["projected"]["sources"]
    token = source["serviceAccountToken"]
    assert token["audience"] == access.identity.audience
    for container in [*worker["initContainers"], *worker["containers"]]:
        folders = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert f"{folders[volume['name']]}/{token['path']}" == access.identity.token_file


def test_token_is_a_mounted_file_in_the_gate_and_in_the_replica(service, group, app):
    """Both read the same secret, the head has none, and no value stands in a manifest."""
    folder = str(Path(app.config.access.token_file).parent)
    if service == built("keyless"):
        folder = str(Path(documented_access("keyless")["identity"]["token_file"]).parent)
    spec = group["template"]["spec"]
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert folder in {mount["mountPath"] for mount in container["volumeMounts"]}
    head = read("base/rayservice.yaml")["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert "huggingface" not in json.dumps(head)


def test_containers_are_all_locked_down(service):
    """No root, no new privileges, no capabilities, a root file system that stays as it is."""
    cluster = service["spec"]["rayClusterConfig"]
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for spec in (template["template"]["spec"] for template in templates):
        assert spec["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_pod_outlives_the_draining_of_its_replica(service, group):
    """Neither Kubernetes nor KubeRay cuts a stream that Serve would let end."""
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > DRAIN_S
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > DRAIN_S


def test_disruption_budgets_cover_the_pods(service):
    """Their selectors meet the labels of head and replicas."""
    cluster = service["spec"]["rayClusterConfig"]
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    labels = [template["template"]["metadata"]["labels"] for template in templates]
    budgets = list(yaml.safe_load_all((ROOT / "base/disruption.yaml").read_text()))
    selected = [budget["spec"]["selector"]["matchLabels"] for budget in budgets]
    assert sorted(map(str, labels)) == sorted(map(str, selected))


def test_group_size_fits_the_replicas(app):
    """Every replica of the base has a pod with its GPUs and CPUs."""
    (group,) = built("base")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    replica = app.config.replica
    assert group["replicas"] >= replica.max_replicas
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= replica.num_gpus
    assert int(container["resources"]["requests"]["cpu"]) >= replica.num_cpus


def size(quantity: str) -> int:
    """Return the bytes of a Kubernetes quantity."""
    number, unit = re.fullmatch(r"(\d+)([GM]i)", quantity).groups()
    return int(number) * UNITS[unit]


def pods(service: Any) -> list[dict[str, Any]]:
    """Return the pod specs of head and workers."""
    cluster = service["spec"]["rayClusterConfig"]
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [template["template"]["spec"] for template in templates]


def test_pod_disks_are_bounded_and_asked_for(service):
    """Kubernetes puts no pod on a node that would evict it in the middle of its download."""
    for pod in pods(service):
        disks = {
            volume["name"]: size(volume["emptyDir"]["sizeLimit"])
            for volume in pod["volumes"]
            if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory"
        }
        assert {"tmp", "scratch"} <= disks.keys()
        (container,) = pod["containers"]
        asked = size(container["resources"]["requests"]["ephemeral-storage"])
        assert sum(disks.values()) + 2**29 <= asked <= sum(disks.values()) + 2**31


def test_weights_fit_twice(app):
    """A rollout fetches the new commit beside the one that serves."""
    (_, worker) = pods(built("base"))
    (volume,) = (volume for volume in worker["volumes"] if volume["name"] == "weights")
    room, model = size(volume["emptyDir"]["sizeLimit"]), WEIGHTS[app.config.model.repo_id]
    assert 2 * model < room < 3 * model


def test_probes_need_nothing_in_the_image(service):
    """Neither wget nor a shell; the kubelet asks, so no proxy variable of the pod matters."""
    head, worker = pods(service)
    for pod in (head, worker):
        (container,) = pod["containers"]
        ports = {port["name"] for port in container["ports"]}
        for name in ("livenessProbe", "readinessProbe"):
            asked = container[name]["httpGet"]
            if asked["port"] == 52365:  # Ray's agent; open without the cluster's token
                assert asked["path"] in PUBLIC_EXACT_PATHS
            else:
                assert (asked["port"] in ports, asked["path"]) == (True, "/-/healthz")
    assert worker["containers"][0]["readinessProbe"]["httpGet"]["port"] == "serve"


if shutil.which("kubectl"):  # one more test where it is there; not counted elsewhere

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_kustomize_makes_what_is_tested_here(variant):
        """The patches and replacements are read by it as by these tests."""
        done = subprocess.run(
            ["kubectl", "kustomize", str(ROOT / variant)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        documents = list(yaml.safe_load_all(done.stdout))
        (service,) = (each for each in documents if each["kind"] == "RayService")
        assert "image: registry.example/serve-app:0.1.0" in done.stdout
        for pod in pods(service):
            for container in [*pod.get("initContainers", ()), *pod["containers"]]:
                container["image"] = "serve-app"
        assert service == built(variant)
