"""`make stack`: a retraining through PostgreSQL, S3, MLflow, Prefect and a worker, all real and on loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import psutil
import pytest
import s3fs
from mlflow import MlflowClient

from tests.flows.stack import PREFECT, ROOT, wait_for

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(1800),  # of a busy machine
    pytest.mark.skipif(not POSTGRES and not shutil.which("initdb"), reason="PostgreSQL is not installed"),
]
PORTS = ("--prefect-port", "0", "--mlflow-port", "0", "--exporter-port", "0")
READY = "Ctrl-C stops everything."


class RunningStack:
    """The program, its output, its environment for clients, and all processes it started."""

    def __init__(self, folder: Path, *options: str):
        self.folder = folder
        self._output = folder / "output"
        command = [sys.executable, "-m", "infra.stack", "--folder", str(folder)]
        with self._output.open("w") as output:
            self.process = subprocess.Popen([*command, *PORTS, *options], cwd=ROOT, stdout=output, stderr=output)
        wait_for(lambda: READY in self.output or self.process.poll() is not None, "the stack", 300)
        assert self.process.poll() is None, self.output
        shown = subprocess.run(["bash", "-c", f". '{folder}/env'; env -0"], capture_output=True, text=True, check=True)
        self.environment = dict(line.split("=", 1) for line in shown.stdout.split("\0") if "=" in line)
        self.parts = psutil.Process(self.process.pid).children(recursive=True)

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._output.read_text()

    @property
    def secrets(self) -> list[str]:
        """What must stay where it is."""
        return [
            (self.folder / "postgres.password").read_text().split(":")[-1].strip(),
            self.environment["AWS_SECRET_ACCESS_KEY"],
        ]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command as in a shell that has read `env`."""
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)

    def retrain(self, run: dict[str, object]) -> str:
        """Ask for a retraining and wait for its end; what the command printed."""
        given = f"run={json.dumps(run)}"
        done = self.run(*PREFECT, "deployment", "run", "retrain/smollm2-cpu", "-p", given, "--watch")
        assert done.returncode == 0, done.stdout + done.stderr + (self.folder / "logs/worker-cpu.log").read_text()
        return done.stdout

    def command(self, action: str, *options: str) -> subprocess.CompletedProcess[str]:
        """`make stack-status` and `make stack-logs`."""
        return self.run(sys.executable, "-m", "infra.stack", action, "--folder", str(self.folder), *options)

    def dump(self, database: str) -> str:
        """All that a database holds, as text."""
        port = (self.folder / "postgres" / "postmaster.pid").read_text().splitlines()[3]
        program = str(POSTGRES[-1] / "pg_dump") if POSTGRES else "pg_dump"
        self.environment["PGPASSFILE"] = str(self.folder / "postgres.password")
        done = self.run(program, "-h", "127.0.0.1", "-p", port, "-U", "hass", database)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stopped(self) -> bool:
        """Whether it and everything it started have ended."""
        alive = [part for part in self.parts if part.is_running() and part.status() != psutil.STATUS_ZOMBIE]
        return self.process.poll() is not None and not alive

    def end(self, number: int = signal.SIGINT) -> None:
        """Ask it to stop."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        wait_for(self.stopped, "all parts to end", 90)


@contextmanager
def running_stack(folder: Path, *options: str) -> Iterator[RunningStack]:
    """A stack that has ended, with all its parts, after the block."""
    stack = RunningStack(folder, *options)
    try:
        yield stack
    finally:
        stack.end()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not under pytest's own, which only its owner may enter: where root runs the tests, PostgreSQL is another user."""
    with tempfile.TemporaryDirectory(prefix="hass-stack-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def shared_preset(tiny_preset) -> Path:
    """Without a store of its own: HASS_STORE names it."""
    lines = tiny_preset.read_text().splitlines(keepends=True)
    tiny_preset.write_text("".join(line for line in lines if not line.startswith("store =")))
    return tiny_preset


def versions(stack: RunningStack) -> list:
    return MlflowClient(stack.environment["MLFLOW_TRACKING_URI"]).search_model_versions("name = 'hass-draft-tiny'")


def test_a_stack_retrains_restarts_loses_a_part_and_is_begun_again_from_its_copy(shared_preset, folder, tmp_path):
    copy = tmp_path / "copy"
    with running_stack(folder) as stack:
        a_retraining_goes_through(stack, shared_preset)
        a_copy_is_written_once(stack, copy)
    assert stack.process.returncode == 0, stack.output
    with running_stack(folder) as stack:
        assert [version.version for version in versions(stack)] == ["1"]
        assert files_of(stack).exists("hass/store/draft")
        when_a_part_dies_it_is_named_and_the_others_are_stopped(stack)
    shutil.rmtree(folder)
    folder.mkdir(mode=0o755)
    with running_stack(folder, "--copy", str(copy)) as stack:
        a_retraining_continues(stack, shared_preset)
        again = [sys.executable, "-m", "infra.stack", "--folder", str(folder), "--copy", str(copy)]
        assert "restoring would mix two" in subprocess.run(again, cwd=ROOT, capture_output=True, text=True).stderr
        stack.end(signal.SIGTERM)


def a_retraining_goes_through(stack: RunningStack, preset: Path) -> None:
    """Runs, files and a champion are where they belong, and secrets nowhere."""
    told = stack.retrain({"preset": str(preset)})
    client = MlflowClient(stack.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("hass")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len([run for run in runs if "mlflow.parentRunId" not in run.data.tags]) == 1
    assert len(runs) > 4
    assert client.get_model_version_by_alias("hass-draft-tiny", "champion").version == "1"
    stages = files_of(stack).ls("hass/store")
    assert {Path(name).name for name in stages} >= {"prompts", "responses", "features", "draft", "evaluation"}
    kept = stack.dump("mlflow") + stack.dump("prefect") + told
    assert not [secret for secret in stack.secrets if secret in kept]


def a_copy_is_written_once(stack: RunningStack, copy: Path) -> None:
    """Of the running stack; a second one needs a folder of its own."""
    done = stack.command("backup", "--copy", str(copy))
    assert done.returncode == 0, done.stderr
    assert "exists already" in stack.command("backup", "--copy", str(copy)).stderr


def when_a_part_dies_it_is_named_and_the_others_are_stopped(stack: RunningStack) -> None:
    """`status` and `logs` tell of it, before and after."""
    shown = stack.command("status")
    assert shown.returncode == 0, shown.stdout
    assert {line.split()[0]: line.split()[1] for line in shown.stdout.splitlines()} == dict.fromkeys(
        ("postgres", "s3", "mlflow", "prefect", "worker-cpu", "exporter"), "running"
    )
    store = next(part for part in stack.parts if "weed" in Path(part.exe()).name)
    os.kill(store.pid, signal.SIGKILL)
    wait_for(stack.stopped, "all parts to end", 90)
    assert stack.process.returncode == 1
    assert "s3 has ended" in stack.output
    shown = stack.command("status")
    assert shown.returncode == 1
    assert "running" not in shown.stdout
    assert "Worker" in stack.command("logs", "--part", "worker-cpu").stdout
    assert "worker-cpu" in stack.command("logs", "--part", "worker").stderr


def a_retraining_continues(stack: RunningStack, preset: Path) -> None:
    """All was lost but the copy: it trains on the features of before, against the champion of before."""
    files = files_of(stack)

    def made() -> dict[str, datetime]:
        """When each of the features' files was written, but the one that tells of their use."""
        names = (name for name in files.find("hass/store/features") if not name.endswith("/used"))
        return {name: files.info(name)["LastModified"] for name in names}

    before = made()
    assert before
    stack.retrain({"preset": str(preset), "training": {"passes": 5}})
    files.invalidate_cache()
    assert made() == before
    assert sorted(version.version for version in versions(stack)) == ["1", "2"]
    judged = next(version for version in versions(stack) if version.version == "2")
    assert "version 1" in judged.description
    completed, api = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}, stack.environment["PREFECT_API_URL"]
    assert httpx.post(f"{api}/flow_runs/count", json=completed).json() == 2
    pages = httpx.get(f"{api.removesuffix('/api')}/ui-settings").json()
    assert pages["api_url"] == api, "the UI asks this server"


def test_a_busy_port_is_told_before_anything_starts(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "infra.stack", "--folder", str(folder), "--mlflow-port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use, and mlflow needs it" in done.stderr
    assert not (folder / "postgres").exists()
    assert not list(folder.rglob("*.log"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--mlflow-port", "4299", "--prefect-port", "4299"), "--mlflow-port is 4299, which another part has"),
        (("--prefect-port", "70000"), "--prefect-port is 70000, and ports go from 1 to 65535"),
        (("--folder", "/dev/null/stack"), "/dev/null/stack: not a directory"),
    ],
)
def test_what_cannot_be_started_is_told_in_one_line(folder, options, told):
    command = [sys.executable, "-m", "infra.stack", "--folder", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert told in done.stderr


def files_of(stack: RunningStack) -> s3fs.S3FileSystem:
    """The store, as the pipeline's own user sees it."""
    region = {"endpoint_url": stack.environment["AWS_ENDPOINT_URL"], "region_name": "us-east-1"}
    key, secret = (stack.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    return s3fs.S3FileSystem(key=key, secret=secret, client_kwargs=region, skip_instance_cache=True)
