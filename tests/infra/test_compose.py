"""What infra/ offers is well-formed and keeps its promises, as far as that shows without an engine."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

INFRA = Path(__file__).parents[2] / "infra"
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY")


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


def test_compose_holds_every_part_and_waits_for_what_exists(compose):
    services = compose["services"]
    assert {"postgres", "s3", "prefect", "mlflow", "worker-cpu", "worker-gpu", "deploy", "buckets"} == set(services)
    for name, service in services.items():
        assert "image" in service, name
        assert set(service.get("depends_on", {})) <= set(services), name
        for other, condition in service.get("depends_on", {}).items():
            assert condition["condition"] != "service_healthy" or "healthcheck" in services[other], (name, other)
        used = {config["source"] for config in service.get("configs", [])}
        assert used <= set(compose["configs"]), name
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(compose["volumes"]), name


def test_compose_publishes_on_loopback_only(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_secret_comes_from_the_environment(compose):
    example = {line.partition("=")[0] for line in (INFRA / "env.example").read_text().splitlines() if line[:1] != "#"}
    for name, service in compose["services"].items():
        for key, value in service.get("environment", {}).items():
            assert not SECRET.search(key) or "${" in value or value.startswith("/"), (name, key)
    assert set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text())) == example


def test_the_gpu_worker_asks_for_the_gpu(compose):
    worker = compose["services"]["worker-gpu"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert worker["build"]["args"] == {"FLAVOR": "gpu"}
    dockerfile = (INFRA / "Dockerfile").read_text()
    assert {"FROM python:3.12-slim AS cpu", "FROM python:3.12-slim AS gpu"} <= set(dockerfile.splitlines())
    assert "USER hass" in dockerfile


def test_the_s3_user_may_use_its_buckets_and_no_more(compose):
    identities = json.loads(compose["configs"]["s3-identities"]["content"])["identities"]
    actions = [action for identity in identities for action in identity["actions"]]
    assert all(action.partition(":")[2] in ("hass", "mlflow") for action in actions)
    assert not [action for action in actions if action.startswith("Admin")]


@pytest.mark.parametrize("path", sorted((INFRA / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # the trainer chooses its own
    assert config.num_processes >= config.num_machines
