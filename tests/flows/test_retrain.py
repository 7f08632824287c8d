"""`python -m flows.retrain` as a user types it: results, reuse, mistakes, Ctrl-C, secrets."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from hass_core.config import load_config
from hass_core.features.reader import shard_names
from hass_core.store import Artifact, Store
from hass_core.store.housekeeping import entries
from tasks.tracking.runs import UNTRACKED, flatten
from tests.flows import names
from tests.flows.stack import ROOT, end, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-4711",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-secret-4712",
    "PREFECT_API_AUTH_STRING": "admin:planted-prefect-secret-4713",
}


@pytest.fixture
def with_server(environment, prefect_api) -> dict[str, str]:
    """The same where PREFECT_API_URL names a server."""
    return environment | {"PREFECT_API_URL": prefect_api}


@pytest.fixture
def environment(prefect_home) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    return kept | {"PREFECT_HOME": str(prefect_home), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **SECRETS}


def command(preset: Path | str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "flows.retrain", str(preset), *overrides]


def retrain(environment, preset: Path | str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(preset, *overrides), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def report_of(done: subprocess.CompletedProcess[str]) -> str:
    """The page whose address a retraining printed."""
    (address,) = re.findall(r"^report: (\S+)$", done.stdout, re.MULTILINE)
    return Path(address).read_text()


def finished_stages(preset: Path) -> dict[Path, int]:
    found = (preset.parent / ".hass/store").rglob("manifest.json")
    return {path.relative_to(preset.parent): path.stat().st_mtime_ns for path in found}


def stages(paths) -> list[str]:
    return sorted(path.parts[-3] for path in paths)


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_retraining_ends_with_report_and_version_a_repeat_as_nothing_new_and_the_next_reuses_what_it_can(
    environment, with_server, tiny_preset, prefect_home
):
    first = retrain(environment, tiny_preset, "execution.workers=2")
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"speed-up .*\[.*\] ×", first.stdout)
    assert "lossless" in first.stdout
    assert "registered  hass-draft-tiny version 1" in first.stdout
    assert "promoted: there is no champion" in first.stdout
    assert "mlflow ui --host 127.0.0.1" in first.stdout
    made = ("prompts", "responses", "features", "draft", "evaluation")
    told = re.findall(r"^(\w+) +(started|done in \d+ s: .*\d)", first.stdout, re.MULTILINE)  # it is no terminal
    assert [name for name, _ in told] == [*(name for name in made for _ in range(2)), "gate", "exports"]
    assert re.search(r"^gate +done in \d+ s: promoted$", first.stdout, re.MULTILINE)
    assert re.search(r"^  \S*hass chat \S+/store/draft/\w{16}$", first.stdout, re.MULTILINE)
    page = report_of(first)
    assert "There was no champion to compare with: it is the first." in page
    before = finished_stages(tiny_preset)
    assert stages(before) == ["draft", "evaluation", "features", "prompts", "responses"]
    the_shards_were_tasks(tiny_preset, prefect_home)

    database = f"sqlite:///{tiny_preset.parent}/.hass/mlflow.db"
    recorded = record_of(database)
    again = retrain(with_server, tiny_preset)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing new: hass-draft-tiny version 1, the champion, was made of the same prompts" in again.stdout
    assert record_of(database) == recorded
    assert finished_stages(tiny_preset) == before

    second = retrain(with_server, tiny_preset, "training.passes=5")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "version 2" in second.stdout
    assert len(re.findall(r"^\w+ +found finished,", second.stdout, re.MULTILINE)) == 3
    gain = r"^duel +done in \d+ s: against the champion \(version 1\), [+-]\d.*%"
    assert re.search(gain, second.stdout, re.MULTILINE)
    page = report_of(second)
    assert "What changed since the champion, version 1" in page
    assert "<td>training.passes</td><td>4.0</td><td>5.0</td>" in page
    assert page.count("<td>found finished</td>") == 3
    assert "passes = 5.0" in page.partition("How to repeat it")[2]
    assert re.search(r"^(not )?promoted: the gain over the champion \(version 1\) is", second.stdout, re.MULTILINE)
    after = finished_stages(tiny_preset)
    assert {path: after[path] for path in before} == before
    assert stages(after.keys() - before.keys()) == ["draft", "duel", "evaluation"]

    program = [sys.executable, "-m", "flows.promote_draft", str(tiny_preset), "version=2"]
    asked = subprocess.run(program, cwd=ROOT, env=with_server, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    lines = [line.split()[:2] for line in asked.stdout.splitlines() if re.match(r"(gate|duel) ", line)]
    if "the champion already" not in asked.stdout:  # as the first duel went
        assert lines == [["gate", "started"], ["duel", "started"], ["duel", "done"], ["gate", "done"]]
    else:
        assert lines == [["gate", "started"], ["gate", "done"]]

    client = MlflowClient(database)
    experiment = client.get_experiment_by_name("hass")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in runs] == ["FINISHED"] * 12
    assert len(parents) == 2
    names_are_those_of_the_documents(client, runs)
    model = client.get_logged_model(client.get_model_version("hass-draft-tiny", "1").tags["hass.logged_model"])
    assert {"evaluation/speedup", "evaluation/tau_macro"} <= {metric.key for metric in model.metrics or []}
    assert (model.params or {})["training.passes"] == "4.0"
    assert {"evaluation/report.json", "evaluation/report.html"} <= {
        file.path for file in client.list_artifacts(parents[0].info.run_id, "evaluation")
    }
    second_run = client.get_model_version("hass-draft-tiny", "2").run_id or ""
    told = {file.path for file in client.list_artifacts(second_run, "promotion")}
    assert told == {"promotion/verdict.md", "promotion/gain.png"}
    assert "## Version 2: " in client.get_run(second_run).data.tags["mlflow.note.content"]
    for secret in SECRETS.values():
        assert secret not in first.stdout + first.stderr
        assert files_with(secret, tiny_preset.parent) == []
        assert files_with(secret, prefect_home) == []


def record_of(database: str) -> list[object]:
    """All that MLflow holds of runs and versions."""
    client = MlflowClient(database)
    experiment = client.get_experiment_by_name("hass")
    assert experiment is not None
    runs = sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.run_id)
    versions = sorted(client.search_model_versions(), key=lambda version: int(version.version))
    return [[run.to_dictionary() for run in runs], [dict(version) for version in versions]]


def the_shards_were_tasks(preset: Path, prefect_home: Path) -> None:
    """`execution.workers` above 1: each shard of the features is a task of its own."""
    store = Store(preset.parent / ".hass/store")
    features = next(entry for entry in entries(store, ["features"]))
    parts = shard_names(store.open(Artifact(stage="features", digest=features.digest, root=store.root)))
    with closing(sqlite3.connect(prefect_home / "prefect.db")) as database:
        tasks = {name for (name,) in database.execute("select name from task_run")}
    assert len(parts) > 1
    assert {f"extract {part}" for part in parts} <= tasks


def names_are_those_of_the_documents(client: MlflowClient, runs: list[Run]) -> None:
    """Metrics, parameters and tags, both ways; the tags of a rollback, an export and a server are not there yet."""
    metrics = {name for run in runs for name in run.data.metrics}
    assert names.unlisted(metrics, names.promised_metrics()) == set()
    assert names.missing(metrics, names.promised_metrics()) <= {"system/…"}  # sampled every ten seconds
    settings = flatten(load_config("smollm2-cpu", []).model_dump(mode="json", exclude=UNTRACKED))
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert all(run.data.params.keys() == settings.keys() for run in parents)
    tags = {name for run in runs for name in run.data.tags}
    tags |= {name for version in client.search_model_versions() for name in version.tags}
    tags = {name for name in tags if not name.startswith("mlflow.")}
    assert names.unlisted(tags, names.promised_tags()) == set()
    later = {"hass.replaced", "hass.withdrawn", "hass.export.ENGINE", "prefect.flow_run_url"}
    later |= {"hass.released", "hass.watch", "hass.warm_start"}
    assert names.missing(tags, names.promised_tags()) <= later


def test_a_wrong_setting_is_one_sentence_and_exit_code_2(environment, tiny_preset):
    done = retrain(environment, tiny_preset, "training.pases=5")
    assert done.returncode == 2
    assert "training.pases: no such setting; did you mean training.passes?" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_mistake_found_by_a_stage_is_one_sentence_too(with_server, tiny_preset):
    done = retrain(with_server, tiny_preset, 'prompts.files=["/nowhere.jsonl"]')
    assert done.returncode == 2
    assert done.stderr.strip().endswith("error: /nowhere.jsonl: no such file; check prompts.files")
    assert "Traceback" not in done.stdout + done.stderr


def test_ctrl_c_says_how_to_go_on(environment, tiny_preset, tmp_path):
    endless = ("training.passes=900", "training.checkpoint_every_steps=2")
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            command(tiny_preset, *endless),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job behind `&` ignores it
        )
        try:
            drafts = tiny_preset.parent / ".hass/store/draft"
            wait_for(lambda: list(drafts.glob("*/scratch/metrics.jsonl")), "the training to begin", 300)
            os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to the whole foreground group
            assert process.wait(60) == 130
        finally:
            if process.poll() is None:
                end(process)
        output.seek(0)
        printed = output.read()
    assert "stopped; the same command continues from what is finished" in printed
    assert "Traceback" not in printed
