"""Deployments on a real server with a real process worker, and what happens when one of them dies."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from hass_core.serving.metrics import Metrics
from tests.flows.stack import ROOT, Stack, answers, end, free_port, wait_for
from tests.infra.dashboard import unanswered

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CLONED = "0.0.0+clone"
WATCHED = """
hass_champion_served_tau{model="hass-draft-tiny"} 2
hass_champion_expected_tau{model="hass-draft-tiny"} 2
"""  # what is there once the draft is served and watched; tests/infra/test_exporter.py has it from the exporter


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A git repository whose one commit is this working tree, of a version that only it has."""
    folder = tmp_path_factory.mktemp("repository") / "hass"
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    version = folder / "hass_core" / "__init__.py"
    version.write_text(version.read_text() + f'\n__version__ = "{CLONED}"\n')
    as_somebody = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*as_somebody, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


@pytest.fixture(scope="module")
def stack(tmp_path_factory, repository) -> Iterator[Stack]:
    """Deployments whose runs clone the repository at its commit."""
    code = {"HASS_CODE_REPOSITORY": repository.as_uri(), "HASS_CODE_COMMIT": commit_of(repository)}
    stack = Stack(tmp_path_factory.mktemp("stack"), **code)
    try:
        yield stack
    finally:
        stack.stop()


def commit_of(repository: Path) -> str:
    head = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def start_retraining(stack: Stack, preset: Path, **parameters: object) -> str:
    """The id of its flow run, begun by the deployment."""
    given = json.dumps({"preset": str(preset), **parameters})
    told = stack.prefect("deployment", "run", "retrain/smollm2-cpu", "-p", f"run={given}").stdout
    return told.partition("UUID: ")[2].split()[0]


def ended(stack: Stack, run_id: str) -> dict[str, Any]:
    """A flow run when it has ended, by the server's word; the stream that `--watch` follows breaks on a busy SQLite."""
    ends = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    wait_for(lambda: stack.api_get(f"flow_runs/{run_id}")["state_type"] in ends, "the flow run's end", 200)
    return stack.api_get(f"flow_runs/{run_id}")


def records(preset: Path) -> tuple[list, list]:
    """MLflow's parent runs and the registered drafts of the preset's local database."""
    client = MlflowClient(f"sqlite:///{preset.parent}/.hass/mlflow.db")
    experiment = client.get_experiment_by_name("hass")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return parents, client.search_model_versions("name = 'hass-draft-tiny'")


def manifests(preset: Path) -> dict[str, int]:
    """Time of completion of every finished stage."""
    found = (preset.parent / ".hass/store").glob("*/*/manifest.json")
    return {path.parts[-3]: path.stat().st_mtime_ns for path in found}


def the_code_was_the_clones(preset: Path, repository: Path, run: Run) -> None:
    """The run and every stage name the commit that was asked for, and no other version of the code was at work."""
    assert run.data.tags["mlflow.source.git.commit"] == commit_of(repository)
    for path in (preset.parent / ".hass/store").rglob("manifest.json"):
        made_by = json.loads(path.read_text())["provenance"]
        assert (made_by["hass"], made_by["commit"]) == (CLONED, commit_of(repository)), path


def test_the_form_has_bounds_and_descriptions_and_the_schedule_is_weekly(stack):
    found = stack.api_get("deployments/name/retrain/smollm2-cpu")
    assert found["schedules"][0]["schedule"]["cron"] == "0 3 * * 0"
    training = found["parameter_openapi_schema"]["definitions"]["TrainingChanges"]["properties"]
    assert training["passes"]["description"]
    assert training["align_steps"]["anyOf"][0]["maximum"] == 8


def test_the_schedule_makes_runs_ahead_of_time(stack):
    def scheduled() -> list[dict]:
        return [run for run in stack.flow_runs() if run["state_type"] == "SCHEDULED" and run["auto_scheduled"]]

    wait_for(scheduled, "the scheduler to make the coming runs", 60)
    assert {run["expected_start_time"][11:16] for run in scheduled()} == {"03:00"}
    assert {run["work_pool_name"] for run in scheduled()} == {"cpu"}


def test_deploying_again_keeps_what_an_operator_set(stack):
    def as_it_is() -> str:
        places = [
            f"deployments/name/{name}" for name in ("retrain/smollm2-cpu", "retrain/gpu", "promote-draft/smollm2-cpu")
        ]
        shown = [stack.api_get(place) for place in (*places, "work_pools/cpu", "work_pools/gpu")]
        return re.sub(r'"(updated|last_polled|status)": [^,]*,', "", json.dumps(shown, sort_keys=True))

    weekly = stack.api_get("deployments/name/retrain/smollm2-cpu")
    schedule = weekly["schedules"][0]["id"]
    stack.api_patch("work_pools/gpu", {"concurrency_limit": 4})
    stack.api_patch(f"deployments/{weekly['id']}", {"paused": True, "concurrency_limit": 3})
    heartbeat = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}  # Prefect's own is longer than the automation waits
    theirs = {"stream_output": False, "env": {"OMP_NUM_THREADS": "2"}}
    stack.api_patch(f"deployments/{weekly['id']}", {"job_variables": theirs})
    stack.api_patch(f"deployments/{weekly['id']}/schedules/{schedule}", {"active": False})
    try:
        stack.deploy()
        variables = stack.api_get(f"deployments/{weekly['id']}")["job_variables"]
        assert variables == {"stream_output": False, "env": {"OMP_NUM_THREADS": "2", **heartbeat}}
        before = as_it_is()
        assert '"paused": true' in before
        ours = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
        limited, last = stack.deploy().splitlines()
        assert "smollm2-cpu (flows/retrain.py:retrain) keeps its concurrency limit of 3" in limited
        assert last == f"{len(ours)} deployments are up to date"
        assert as_it_is() == before
    finally:
        stack.api_patch(f"deployments/{weekly['id']}", {"paused": False, "concurrency_limit": None})
        stack.api_patch(f"deployments/{weekly['id']}", {"job_variables": {"env": heartbeat}})


def test_a_wrong_parameter_is_refused_before_the_run_starts(stack):
    done = stack.prefect(
        "deployment", "run", "retrain/smollm2-cpu", "-p", 'run={"training": {"passes": -1}}', check=False
    )
    assert done.returncode != 0
    assert "passes" in done.stdout + done.stderr


def test_a_killed_flow_is_completed_by_the_same_command_and_nothing_is_done_twice(stack, repository, tiny_preset):
    long_training = ["training.passes=24", "training.checkpoint_every_steps=2"]
    killed = start_retraining(stack, tiny_preset, overrides=long_training)
    draft = tiny_preset.parent / ".hass/store/draft"
    wait_for(lambda: list(draft.glob("*/scratch/metrics.jsonl")), "the training to begin", 120)
    process = stack.flow_process()
    assert process is not None
    process.kill()
    before = manifests(tiny_preset)
    assert sorted(before) == ["features", "prompts", "responses"]
    wait_for(lambda: stack.api_get(f"flow_runs/{killed}")["state_type"] == "CRASHED", "the crash to be noticed", 60)

    done = ended(stack, start_retraining(stack, tiny_preset, overrides=long_training))
    assert done["state_type"] == "COMPLETED", f"{done['state']}{stack.log('worker')}"
    after = manifests(tiny_preset)
    assert {stage: after[stage] for stage in before} == before
    parents, versions = records(tiny_preset)
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert parents[0].data.tags["prefect.flow_run_url"].startswith("http://127.0.0.1")
    assert len(versions) == 1
    the_code_was_the_clones(tiny_preset, repository, parents[0])


def test_a_stage_runs_on_the_pool_it_needs_and_the_retraining_goes_on_with_it(stack, tiny_preset):
    gpu_worker = stack.start("gpu-worker", "worker", "start", "--pool", "gpu", "--name", "gpu-test")
    try:
        run_id = start_retraining(stack, tiny_preset, deployments={"draft": "train-draft/gpu"})
        outer = ended(stack, run_id)
        assert outer["state_type"] == "COMPLETED", (
            outer["state"]["message"] + stack.log("worker") + stack.log("gpu-worker")
        )
    finally:
        end(gpu_worker)
    [inner] = stack.api_post("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run_id]}}})
    assert inner["state_type"] == "COMPLETED"
    assert (inner["work_pool_name"], outer["work_pool_name"]) == ("gpu", "cpu")
    assert inner["parent_task_run_id"]
    parents, versions = records(tiny_preset)
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert parents[0].data.tags["prefect.flow_run_id"] == outer["id"]
    assert len(versions) == 1
    every_query_of_the_dashboard_is_answered(stack, tiny_preset)


def every_query_of_the_dashboard_is_answered(stack: Stack, preset: Path) -> None:
    """The exporter's page of this stack, and that of `hass serve`, have what infra/grafana asks for."""
    port = free_port()
    exporter = stack.program("exporter", "-m", "infra.exporter", "--port", str(port), "--preset", str(preset))
    try:
        url = f"http://127.0.0.1:{port}/metrics"
        up = [f'hass_source_up{{source="{name}"}} 1' for name in ("prefect", "stages", "champions", "store")]
        wait_for(lambda: answers(url) and all(line in httpx.get(url).text for line in up), "the exporter", 120)
        page = httpx.get(url).text
    finally:
        end(exporter)
    serving = Metrics(lambda: 0, lambda: 0)
    serving.request("ok")
    serving._by_depth.labels(depth=1)  # as a first accepted token makes it
    assert 'hass_flow_runs{state="completed"}' in page
    assert unanswered([page, WATCHED, serving.text().decode()]) == []
