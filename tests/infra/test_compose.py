"""Compose and accelerate files: well-formed, and compose.yaml's own commands run a retraining."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.flows.conftest import tiny_preset

__all__ = ["tiny_preset"]

INFRA = Path(__file__).parents[2] / "infra"
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY")


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


def test_compose_holds_every_part_and_waits_for_what_exists(compose):
    services = compose["services"]
    ours = {"worker-cpu", "worker-gpu", "exporter", "mlflow-user", "deploy"}
    assert {"postgres", "s3", "buckets", "prefect", "mlflow", *ours} == set(services)
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
    assert len(ports) == 3
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
    assert worker["build"]["args"] == {"COMMIT": "${COMMIT:-}", "FLAVOR": "gpu"}
    dockerfile = (INFRA / "Dockerfile").read_text()
    assert {"FROM python:3.12-slim AS cpu", "FROM python:3.12-slim AS gpu"} <= set(dockerfile.splitlines())
    assert "USER hass" in dockerfile


def test_the_s3_user_may_use_its_buckets_and_no_more(compose):
    identities = json.loads(compose["configs"]["s3-identities"]["content"])["identities"]
    actions = [action for identity in identities for action in identity["actions"]]
    assert all(action.partition(":")[2] in ("hass", "mlflow") for action in actions)
    assert not [action for action in actions if action.startswith("Admin")]


def namespaces() -> list[str]:
    """The command that gives a program a network, mounts and processes of its own."""
    return ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc"]


def why_not() -> str | None:
    """What this machine lacks for running the services as processes."""
    if not POSTGRES:
        return "PostgreSQL is not installed"
    if not shutil.which("ip"):
        return "iproute2 is not installed"
    if os.getuid() != 0 or subprocess.run([*namespaces(), "true"], capture_output=True).returncode:
        return "namespaces need root"
    return None


@pytest.mark.stack
@pytest.mark.timeout(1800)
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_services_own_commands_run_a_retraining(tiny_preset):
    lines = tiny_preset.read_text().splitlines(keepends=True)
    tiny_preset.write_text("".join(line for line in lines if not line.startswith("store =")))  # HASS_STORE names it
    names = re.findall(r"^(\w+)=$", (INFRA / "env.example").read_text(), re.MULTILINE)
    secrets = {name: f"{name}-of-this-test" for name in names if name not in ("HF_TOKEN", "COMMIT")}
    path = f"{Path(sys.executable).parent}:{POSTGRES[-1]}:{os.environ['PATH']}"
    environment = os.environ | secrets | {"PATH": path, "S3_ACCESS_KEY": "hass", "PYTHONPATH": str(INFRA.parent)}
    script = Path(__file__).with_name("compose_processes.py")
    run = f'run={{"preset": "{tiny_preset}"}}'
    command = ["prefect", "deployment", "run", "retrain/smollm2-cpu", "-p", run, "--watch"]
    with tempfile.TemporaryDirectory(prefix="hass-compose-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL is another user
        started = [*namespaces(), sys.executable, str(script), folder, *command]
        done = subprocess.run(started, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
        assert "Completed" in done.stdout + done.stderr
        kept = "".join(file.read_text(errors="replace") for file in Path(folder).glob("*.log"))
        assert not [secret for secret in secrets.values() if secret in kept]


@pytest.mark.parametrize("path", sorted((INFRA / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # the trainer chooses its own
    assert config.num_processes >= config.num_machines
