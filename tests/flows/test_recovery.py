"""What survives what: workers and flows killed, the server restarted, MLflow and the store away for a while.

`make test-recovery` runs these, several at a time, for they wait for real time-outs; each process has a server and a
worker of its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from mlflow import MlflowClient

from infra.stack.servers import WITHOUT_JOBS
from tests.flows.stack import ROOT, Stack, answers, end, free_port, wait_for
from tests.s3_server import ACCESS_KEY, SECRET_KEY

pytestmark = [pytest.mark.recovery, pytest.mark.timeout(1800)]  # of a busy machine
OUTAGE_SECONDS = 20
OFTEN_SAVED = ("training.checkpoint_every_steps=20", "training.validate_every_steps=1000")
ENOUGH = ("training.passes=40", *OFTEN_SAVED)  # for a kill once it has begun
LONG = ("training.passes=150", *OFTEN_SAVED)  # outlasts an outage


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        yield stack
    finally:
        stack.stop()


def start_run(
    stack: Stack,
    preset: Path,
    overrides: tuple[str, ...] = LONG,
    deployment: str = "smollm2-cpu",
    flow: str = "retrain",
    **own: object,
) -> str:
    """Ask for a run of a flow, a retraining, with these parameters of its `own`; its flow run's id."""
    deployed = stack.api_get(f"deployments/name/{flow}/{deployment}")["id"]
    parameters = {"run": {"preset": str(preset), "overrides": list(overrides), **own}}
    return str(stack.api_post(f"deployments/{deployed}/create_flow_run", {"parameters": parameters})["id"])


def state(stack: Stack, run_id: str) -> str:
    return str(stack.api_get(f"flow_runs/{run_id}")["state_type"])


def steps_trained(preset: Path) -> int:
    """Steps in the record of the training under way."""
    # no rglob: it looks into every folder, and the training's temporary ones vanish under it
    files = list((preset.parent / ".hass/store/draft").glob("*/scratch/metrics.jsonl"))
    lines = files[0].read_text().splitlines() if files else []
    return len(lines)


def manifests(preset: Path) -> dict[str, int]:
    """Time of completion of every finished stage."""
    found = (preset.parent / ".hass/store").glob("*/*/manifest.json")
    return {path.parts[-3]: path.stat().st_mtime_ns for path in found}


def assert_once(preset: Path, uri: str | None = None) -> None:
    """One MLflow run and one child per stage, all finished, and one registered version."""
    client = MlflowClient(uri or f"sqlite:///{preset.parent}/.hass/mlflow.db")
    experiment = client.get_experiment_by_name("hass")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    stages = sorted(run.data.tags["hass.stage"] for run in runs if "hass.stage" in run.data.tags)
    assert stages == sorted(set(stages))
    assert len([run for run in runs if "mlflow.parentRunId" not in run.data.tags]) == 1
    assert len(client.search_model_versions("name = 'hass-draft-tiny'")) == 1


def assert_no_step_twice(preset: Path) -> None:
    """Training went on from its checkpoint: every step stands in the record once."""
    steps = trained_steps(preset)
    assert steps == sorted(set(steps))
    assert steps[0] == 1


def test_worker_and_flow_killed_the_slot_comes_back_and_the_next_run_completes(stack, tiny_preset):
    worker = stack.start("gpu-worker", "worker", "start", "--pool", "gpu", "--name", "gpu-test")
    first = start_run(stack, tiny_preset, ENOUGH, deployment="gpu")
    wait_for(lambda: steps_trained(tiny_preset) > 30, "the training to begin", 180)
    before = manifests(tiny_preset)
    assert sorted(before) == ["features", "prompts", "responses"]
    end(worker)  # and with it the flow's process
    stack.start("gpu-worker", "worker", "start", "--pool", "gpu", "--name", "gpu-test")
    second = start_run(stack, tiny_preset, ENOUGH, deployment="gpu")
    wait_for(lambda: state(stack, first) == "CRASHED", "the heartbeat automation", 120)
    wait_for(lambda: state(stack, second) == "COMPLETED", "the next run to complete", 300)
    after = manifests(tiny_preset)
    assert {stage: after[stage] for stage in before} == before
    assert_once(tiny_preset)
    assert_no_step_twice(tiny_preset)


def test_a_heartbeat_that_stops_crashes_runs_tagged_hass_and_no_others(stack):
    flow = stack.api_post("flows/", {"name": "of-somebody"})["id"]

    def run_with(tags: list[str]) -> str:
        """A run that sends one heartbeat and then no more."""
        made = {"flow_id": flow, "tags": tags, "state": {"type": "RUNNING"}}
        run_id = stack.api_post("flow_runs/", made)["id"]
        related = [{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in tags]
        heartbeat = {
            "id": str(uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": "prefect.flow-run.heartbeat",
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run_id}"},
            "related": related,
        }
        stack.api_post("events", [heartbeat])
        wait_for(lambda: run_id in heartbeats(stack), "the heartbeat to be on record", 60)  # else it may come last
        return run_id

    foreign, waiting, ended = (run_with(tags) for tags in (["billing"], ["hass", "retrain"], ["hass", "retrain"]))
    stack.set_state(waiting, "PAUSED", "Suspended")
    stack.set_state(ended, "COMPLETED", "Nothing new")
    ours = run_with(["hass", "retrain"])
    wait_for(lambda: state(stack, ours) == "CRASHED", "the automation", 180)
    wait_for(lambda: ours in touched_by_automations(stack), "the automation's own record", 60)
    time.sleep(10)  # the others began before ours
    assert state(stack, foreign) == "RUNNING"
    assert state(stack, waiting) == "PAUSED", "who waits for a person has no process and no heartbeat"
    assert state(stack, ended) == "COMPLETED"
    assert not {foreign, waiting, ended} & touched_by_automations(stack)


def touched_by_automations(stack: Stack) -> set[str]:
    """The flow runs whose state an automation changed, or tried to change."""
    return runs_in_events(stack, {"prefix": ["prefect.automation.action."]})


def heartbeats(stack: Stack) -> set[str]:
    """The flow runs whose heartbeats the server has taken down."""
    return runs_in_events(stack, {"name": ["prefect.flow-run.heartbeat"]})


def runs_in_events(stack: Stack, kind: dict[str, list[str]]) -> set[str]:
    """The flow runs that the newest events of a kind name."""
    events = stack.api_post("events/filter", {"filter": {"event": kind}, "limit": 50})["events"]
    return set(re.findall(r"prefect\.flow-run\.([0-9a-f-]{36})", json.dumps(events)))


def test_a_crashed_run_starts_again_by_itself_and_completes(stack, tiny_preset):
    run = start_run(stack, tiny_preset, ENOUGH)
    wait_for(lambda: steps_trained(tiny_preset) > 30, "the training to begin", 180)
    process = stack.flow_process()
    assert process is not None
    process.kill()
    before = manifests(tiny_preset)
    wait_for(lambda: state(stack, run) == "CRASHED", "the crash to be noticed", 120)
    wait_for(lambda: state(stack, run) == "COMPLETED", "the automation, and the run to complete", 400)
    after = manifests(tiny_preset)
    assert {stage: after[stage] for stage in before} == before
    assert_once(tiny_preset)
    assert_no_step_twice(tiny_preset)


def test_a_run_that_crashes_for_the_third_time_is_left_to_people(stack):
    def run_with(crashes: int) -> str:
        """A run that nobody executes, after so many crashes; after all but the last, people were faster."""
        run = stack.api_post(f"deployments/{deployment}/create_flow_run", {})["id"]
        for number in range(crashes):
            if number:
                stack.set_state(run, "SCHEDULED", "AwaitingRetry")
            for kind in ("PENDING", "RUNNING", "CRASHED"):
                stack.set_state(run, kind)
        return run

    flow = stack.api_post("flows/", {"name": "nobodys"})["id"]
    made = {"name": "nobodys", "flow_id": flow, "tags": ["hass", "retrain"]}
    deployment = stack.api_post("deployments/", made)["id"]
    often, once = run_with(3), run_with(1)
    wait_for(lambda: state(stack, once) == "SCHEDULED", "the automation", 180)
    time.sleep(10)  # the other one crashed before
    assert state(stack, often) == "CRASHED"


def test_a_promotion_waits_for_a_person_without_a_process_and_goes_on_when_resumed(stack, tiny_preset):
    run = start_run(stack, tiny_preset, ("promotion.approval=true",))
    wait_for(lambda: state(stack, run) == "PAUSED", "the draft to be measured", 300)
    wait_for(lambda: stack.flow_process() is None, "the process to end", 60)
    client = MlflowClient(f"sqlite:///{tiny_preset.parent}/.hass/mlflow.db")
    assert client.get_registered_model("hass-draft-tiny").aliases == {"challenger": 1}
    before = manifests(tiny_preset)
    stack.set_state(run, "CRASHED")  # as the automation does when a last heartbeat comes after the suspension
    wait_for(lambda: state(stack, run) == "PAUSED", "it to be started again, and to wait again", 300)
    wait_for(lambda: stack.flow_process() is None, "the process to end", 60)
    stack.api_post(f"flow_runs/{run}/resume", {"run_input": {"approved": True}})
    wait_for(lambda: state(stack, run) == "COMPLETED", "the run to complete", 300)
    assert client.get_registered_model("hass-draft-tiny").aliases == {"champion": 1}
    assert manifests(tiny_preset) == before
    assert_once(tiny_preset)


def test_a_person_refuses_in_the_form_and_the_commands_decide_on_what_waits(stack, tiny_preset):
    client = MlflowClient(f"sqlite:///{tiny_preset.parent}/.hass/mlflow.db")

    def ended(run: str) -> dict[str, int]:
        """The aliases when the run has completed."""
        wait_for(lambda: state(stack, run) == "COMPLETED", "the run to complete", 300)
        return client.get_registered_model("hass-draft-tiny").aliases

    def verdict(version: int) -> str:
        told = client.get_model_version("hass-draft-tiny", str(version))
        return f"{told.tags.get('hass.promoted')}: {(told.description or '').partition('## Version')[2]}"

    run = start_run(stack, tiny_preset, ("promotion.approval=true",))
    wait_for(lambda: state(stack, run) == "PAUSED", "the draft to be measured", 300)
    answer = {"approved": False, "reason": "a load test is in the log"}
    stack.api_post(f"flow_runs/{run}/resume", {"run_input": answer})
    assert ended(run) == {}
    assert verdict(1).startswith("false:  1: not promoted\n\n- a load test is in the log")

    by_hand = ("promotion.automatic=false",)
    assert ended(start_run(stack, tiny_preset, (*by_hand, "seed=1"))) == {"challenger": 2}
    assert verdict(2) == "None: "
    promotion = start_run(stack, tiny_preset, by_hand, flow="promote-draft")
    assert ended(promotion) == {"champion": 2}
    told = stack.api_get(f"flow_runs/{promotion}")["state"]["message"]
    assert told.startswith("version 2: promoted (there is no champion"), "for those who see the run and no terminal"
    assert verdict(2).startswith("true:  2: promoted")

    assert ended(start_run(stack, tiny_preset, (*by_hand, "seed=2"))) == {"challenger": 3, "champion": 2}
    refusal = start_run(stack, tiny_preset, by_hand, flow="reject-draft", reason="too slow in production")
    assert ended(refusal) == {"champion": 2}
    assert verdict(3).startswith("false:  3: not promoted\n\n- too slow in production")


def test_the_server_restarted_in_mid_run(stack, tiny_preset):
    run = start_run(stack, tiny_preset)
    wait_for(lambda: steps_trained(tiny_preset) > 30, "the training to begin", 180)
    stack.restart_server(seconds_away=15)
    details = stack.api_get(f"flow_runs/{run}")["state"]["state_details"]
    assert not details["deployment_concurrency_lease_id"], "renewed every 225 s, or the run is ended"
    wait_for(lambda: state(stack, run) == "COMPLETED", "the run to complete", 300)
    assert_once(tiny_preset)
    assert_no_step_twice(tiny_preset)


def test_mlflow_away_for_a_while(stack, tiny_preset, tmp_path):
    server = MLflowServer(tmp_path)
    try:
        run = start_run(stack, tiny_preset, (*LONG, f"tracking.uri={server.uri}"))
        wait_for(lambda: steps_trained(tiny_preset) > 30, "the training to begin", 180)
        end(server.process)
        time.sleep(OUTAGE_SECONDS)
        server.start()
        wait_for(lambda: state(stack, run) == "COMPLETED", "the run to complete", 400)
        assert_once(tiny_preset, server.uri)
        client = MlflowClient(server.uri)
        (draft,) = client.search_runs(["1"], "tags.`hass.stage` = 'draft'")
        assert len(client.get_metric_history(draft.info.run_id, "train/loss")) == len(trained_steps(tiny_preset))
    finally:
        end(server.process)


def test_the_store_away_for_a_while(s3_store, s3_proxy, tiny_preset, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environment |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_proxy.port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "HASS_CACHE": str(tmp_path / "cache"),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "OMP_NUM_THREADS": "1",
    }
    database = f"sqlite:///{tmp_path}/mlflow.db"
    overrides = [f"store={s3_store.root}", f"tracking.uri={database}"]
    command = [sys.executable, "-m", "flows.retrain", str(tiny_preset), *overrides]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            wait_for(lambda: s3_store.fs.glob(f"{s3_store.root}/responses/*/manifest.json"), "the answers", 180)
            s3_proxy.fail("500")
            time.sleep(OUTAGE_SECONDS)
            s3_proxy.mode = "pass"
            assert process.wait(300) == 0, (tmp_path / "output").read_text()[-3000:]
            assert "AWS_ENDPOINT_URL" in (told := (tmp_path / "output").read_text()), "who waits for it is told"
            assert re.search(r"is tried again in \d+ s", told), "the outage was longer than what its client rides out"
        finally:
            if process.poll() is None:
                end(process)
    assert_once(tiny_preset, database)


def test_a_worker_stops_within_30_seconds_of_sigterm_and_training_goes_on_from_its_checkpoint(stack, tiny_preset):
    run = start_run(stack, tiny_preset)
    wait_for(lambda: steps_trained(tiny_preset) > 30, "the training to begin", 180)
    family = psutil.Process(stack.worker.pid).children(recursive=True)
    stack.worker.send_signal(signal.SIGTERM)
    stack.worker.wait(30)
    assert not any(is_alive(process) for process in family)
    checkpoints = list((tiny_preset.parent / ".hass/store/draft").rglob("checkpoint-*.safetensors"))
    assert checkpoints
    stack.worker = stack.start_worker()
    wait_for(lambda: state(stack, run) in ("CRASHED", "CANCELLED", "FAILED", "SCHEDULED"), "the run's end", 120)
    again = start_run(stack, tiny_preset)
    wait_for(lambda: state(stack, again) == "COMPLETED", "the next run to complete", 300)
    assert_once(tiny_preset)
    assert_no_step_twice(tiny_preset)


def test_a_cancelled_run_ends_every_process_of_its_training_and_the_next_run_goes_on(stack, tiny_preset):
    twice = (*LONG, "execution.gpus=2", "training.packs_per_step=2")
    run = start_run(stack, tiny_preset, twice)
    wait_for(lambda: steps_trained(tiny_preset) > 30, "the training to begin", 300)
    flow = stack.flow_process()
    assert flow is not None
    family = [flow, *flow.children(recursive=True)]
    trainers = [process for process in family if "hass_core.training" in process.cmdline()]
    assert len(trainers) >= 2, "a process for each of execution.gpus"
    stack.set_state(run, "CANCELLING")
    wait_for(lambda: state(stack, run) == "CANCELLED", "the worker to end the run", 120)
    wait_for(lambda: not any(is_alive(process) for process in family), "its processes to end", 60)
    assert list((tiny_preset.parent / ".hass/store/draft").rglob("checkpoint-*.safetensors"))
    again = start_run(stack, tiny_preset, twice)
    wait_for(lambda: state(stack, again) == "COMPLETED", "the next run to complete", 400)
    assert_once(tiny_preset)
    assert_no_step_twice(tiny_preset)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def trained_steps(preset: Path) -> list[int]:
    (file,) = (preset.parent / ".hass/store/draft").rglob("metrics.jsonl")
    return [row["step"] for row in map(json.loads, file.read_text().splitlines()) if "train/loss" in row]


class MLflowServer:
    """A real MLflow server on loopback that can be stopped and started again."""

    def __init__(self, folder: Path):
        self._folder, port = folder, free_port()
        self.uri = f"http://127.0.0.1:{port}"
        store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/files"]
        address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        self._command = [sys.executable, "-m", "mlflow", "server", *address, *store]
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        environment = os.environ | WITHOUT_JOBS | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=self._folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: answers(f"{self.uri}/health"), "the MLflow server", 120)
