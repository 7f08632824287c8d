"""The job template of a GPU pool, held to its readers: Prefect's server and worker, and Kubernetes' own schema."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.utilities.schema_tools.validation import is_valid
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

TEMPLATE = Path(__file__).parents[2] / "infra" / "kubernetes" / "gpu-job.json"
KUBERNETES = "1.32"
PREFECTS_OWN = ("parallelism", "completions")  # its check wants them in the pod's part too, where Kubernetes drops them


@pytest.fixture
def template() -> dict[str, Any]:
    return json.loads(TEMPLATE.read_text())


def manifest(template: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The Job that the worker would create for a flow run, with these job variables of its deployment."""
    nowhere = PrefectClient("http://127.0.0.1:9/api")  # blocks and variables would be asked for there: there are none
    made = KubernetesWorkerJobConfiguration.from_template_and_values(template, values, client=nowhere)
    configuration = asyncio.run(made)
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="bold-run"))
    return configuration.job_manifest


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def check(job: dict[str, Any]) -> None:
    """Raise unless Kubernetes takes the job; fields that it does not know are errors."""
    kept = {name: value for name, value in pod(job).items() if name not in PREFECTS_OWN}
    spec = {**job["spec"], "template": {**job["spec"]["template"], "spec": kept}}
    kubernetes_validate.validate({**job, "spec": spec}, KUBERNETES, strict=True)


def test_prefects_server_and_worker_and_kubernetes_take_the_template(template):
    WorkPoolCreate(name="gpu", type="kubernetes", base_job_template=template)
    job = manifest(template)
    check(job)
    (container,) = pod(job)["containers"]
    assert container["args"][:2] == ["prefect", "flow-run"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/cache", "/dev/shm"}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["HF_HOME"].startswith("/cache/")
    assert environment["HASS_CACHE"].startswith("/cache/")


def test_what_a_deployment_sets_reaches_the_job(template):
    job = manifest(
        template,
        gpus=4,
        cpu="32",
        shared_memory="32Gi",
        node_selector={"pool": "h100"},
        tolerations=[{"key": "reserved", "operator": "Exists"}],
        image="registry/hass:1",
        image_pull_policy="Always",
        image_pull_secrets=[{"name": "registry"}],
        cache_volume={"name": "cache", "persistentVolumeClaim": {"claimName": "hass-cache"}},
        env={"EXTRA": "yes"},
    )
    check(job)
    (container,) = pod(job)["containers"]
    assert container["resources"]["requests"] == {"nvidia.com/gpu": 4, "cpu": "32", "memory": "64Gi"}
    assert (container["image"], container["imagePullPolicy"]) == ("registry/hass:1", "Always")
    assert pod(job)["imagePullSecrets"] == [{"name": "registry"}]
    assert pod(job)["nodeSelector"] == {"pool": "h100"}
    assert pod(job)["tolerations"] == [{"key": "reserved", "operator": "Exists"}]
    cache, shared = pod(job)["volumes"]
    assert cache["persistentVolumeClaim"] == {"claimName": "hass-cache"}
    assert shared["emptyDir"]["sizeLimit"] == "32Gi"
    assert {"EXTRA", "HF_HOME"} <= {entry["name"] for entry in container["env"]}


@pytest.mark.parametrize(
    "values",
    [
        {"gpus": 0, "image": "hass-pipeline:cpu", "tolerations": []},  # of the pool cpu
        {"cache_volume": {"name": "cache", "hostPath": {"path": "/data/hass"}}},
        {"image_pull_secrets": [{"name": "registry"}], "node_selector": {}},
    ],
)
def test_what_an_operator_may_set_the_server_takes_and_so_does_kubernetes(template, values):
    assert is_valid(values, template["variables"])
    check(manifest(template, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"cache_volume": {}},
        {"cache_volume": {"name": "models", "persistentVolumeClaim": {"claimName": "hass-cache"}}},  # mounted as cache
        {"gpus": -1},
        {"image_pull_secrets": ["registry"]},
        {"image_pull_policy": "Sometimes"},
        {"memory": 64},
    ],
)
def test_what_no_job_could_start_with_the_server_refuses(template, values):
    assert not is_valid(values, template["variables"])


def test_prefects_own_check_would_see_a_template_without_its_counts(template):
    job = template["job_configuration"]["job_manifest"]["spec"]
    for name in PREFECTS_OWN:
        del job[name], job["template"]["spec"][name]
    with pytest.raises(ValueError, match="parallelism"):
        manifest(template)


def test_prefects_own_check_would_see_another_name_of_the_container(template):
    template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0]["name"] = "flow"
    with pytest.raises(ValueError, match="prefect-job"):
        manifest(template)


def test_kubernetes_own_schema_would_see_a_misspelt_field(template):
    job = manifest(template)
    pod(job)["containers"][0]["imagePullPolicies"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolicies"):
        check(job)


def test_every_variable_is_used_and_an_unknown_one_is_refused(template):
    used = json.dumps(template["job_configuration"])
    assert [name for name in template["variables"]["properties"] if f"{{{{ {name} }}}}" not in used] == []
    template["job_configuration"]["namespace"] = "{{ nowhere }}"
    with pytest.raises(ValueError, match="nowhere"):
        WorkPoolCreate(name="gpu", type="kubernetes", base_job_template=template)
