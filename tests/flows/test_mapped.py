"""`execution.workers` in a flow, as a user sets it."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from hass_core.features.reader import shard_names
from hass_core.store import Artifact, Store
from tests.flows.stack import ROOT


@pytest.mark.slow
def test_a_flow_with_two_workers_extracts_each_shard_as_a_task(tiny_preset, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environment = kept | {"PREFECT_HOME": str(tmp_path / "prefect"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flows.extract_features", str(tiny_preset), "execution.workers=2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store(tmp_path / ".hass/store")
    responses, features = (finished(store, stage) for stage in ("responses", "features"))
    assert features.summary["conversations"] == responses.summary["conversations"]
    with closing(sqlite3.connect(tmp_path / "prefect/prefect.db")) as database:
        tasks = {name for (name,) in database.execute("select name from task_run")}
    parts = shard_names(store.open(features))
    assert len(parts) > 1
    assert {f"extract {part}" for part in parts} <= tasks


def finished(store: Store, stage: str) -> Artifact:
    """The only finished artifact of a stage."""
    found = [store.artifact(stage, digest) for digest in os.listdir(f"{store.root}/{stage}")]
    (artifact,) = [artifact for artifact in found if artifact]
    return artifact
