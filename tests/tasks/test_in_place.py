"""A project folder that moved or was copied keeps its runs with their artifacts, and writes new ones where it is."""

import shutil

import mlflow
import pytest
from mlflow import MlflowClient

from hass_core.config import RunConfig
from hass_core.store import Store
from tasks.tracking import find_version, open_retraining, register, stage_run
from tasks.tracking.client import connect, experiment_id, local_folder
from tests.tasks.conftest import make_draft


def config_in(folder) -> RunConfig:
    return RunConfig.model_validate({"name": "tiny", "store": str(folder / ".hass/store")})


def write_run(config: RunConfig, text: str) -> str:
    client = connect(config)
    run = client.create_run(experiment_id(client, config)).info.run_id
    client.log_text(run, text, "note.txt")
    return run


def read_run(config: RunConfig, run: str) -> str:
    client = connect(config)
    return mlflow.artifacts.load_text(client.get_run(run).info.artifact_uri + "/note.txt")


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_artifacts_are_beside_the_database_in_use(tmp_path, how, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = config_in(tmp_path / "first")
    old = write_run(before, "old")
    how(tmp_path / "first", tmp_path / "se cond")
    after = config_in(tmp_path / "se cond")

    assert read_run(after, old) == "old"
    new = write_run(after, "new")
    place = local_folder(after) / "mlartifacts"
    assert [file.read_text() for file in place.rglob("note.txt") if new in str(file)] == ["new"]
    assert read_run(after, new) == "new"
    if how is shutil.copytree:
        assert not [file for file in (tmp_path / "first").rglob("note.txt") if new in str(file)]
        assert read_run(before, old) == "old"
        assert MlflowClient(f"sqlite:///{tmp_path}/first/.hass/mlflow.db").get_run(old).info.artifact_uri.count("first")


def test_a_registered_draft_is_found_where_its_store_lies_now(tmp_path, tiny_target, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before, after = config_in(tmp_path / 'fir"st'), config_in(tmp_path / "sé cond")
    store = Store(before.store)
    draft = make_draft(store, tiny_target)
    with open_retraining(before, draft, {}) as run_id:
        lineage = {"hass.url.draft": draft.url}
        version = register(before, run_id, draft, store, tiny_target, lineage)
        with stage_run(before, run_id, "draft") as run:
            run.record(store, draft, {"draft": draft})
    shutil.move(tmp_path / 'fir"st', tmp_path / "sé cond")

    client = connect(after)
    found = find_version(client, version.model, 1)
    assert found.draft.root == after.store
    assert Store(found.draft.root).open(found.draft).local_path("config.json").is_file()
    tags = client.get_model_version(version.model, version.version).tags
    assert tags["hass.url.draft"] == found.draft.url
    assert "fir" not in str([run.to_dictionary() for run in client.search_runs(["1"])])


def test_artifacts_elsewhere_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_in(tmp_path)
    client = connect(config)
    made = client.create_experiment("mine", artifact_location=(tmp_path / "own" / "place").as_uri())
    connect.__globals__["_client"].cache_clear()
    connect(config)
    assert client.get_experiment(made).artifact_location == (tmp_path / "own" / "place").as_uri()


def test_stores_that_share_a_database_find_each_others_artifacts(tmp_path, monkeypatch):
    """Beside the database that `tracking.uri` names, wherever the stores are."""
    monkeypatch.chdir(tmp_path)
    shared = {"tracking": {"uri": f"sqlite:///{tmp_path}/record/mlflow.db"}}
    one, other = (RunConfig.model_validate(config_in(tmp_path / n).model_dump() | shared) for n in ("one", "other"))
    run = write_run(one, "from one")
    assert write_run(other, "from the other") != run
    assert (read_run(other, run), read_run(one, run)) == ("from one", "from one")
    remote = RunConfig.model_validate(one.model_dump() | {"store": "s3://bucket/store"})
    write_run(remote, "of a store elsewhere")
    assert read_run(remote, run) == "from one"
    assert {path.parts[len(tmp_path.parts)] for path in tmp_path.rglob("note.txt")} == {"record"}


def test_artifacts_that_were_never_beside_the_database_are_found_where_they_are(tmp_path):
    """Of a database from before artifacts went beside it."""
    config = config_in(tmp_path / "project")
    before = write_run(config, "old")
    (tmp_path / "record").mkdir()
    shutil.move(tmp_path / "project/.hass/mlflow.db", tmp_path / "record/mlflow.db")
    tracking = {"tracking": {"uri": f"sqlite:///{tmp_path}/record/mlflow.db"}}
    elsewhere = RunConfig.model_validate(config.model_dump() | tracking)
    assert read_run(elsewhere, before) == "old"
    assert read_run(elsewhere, write_run(elsewhere, "new")) == "new"
    tracking["tracking"]["experiment"] = "another"
    another = RunConfig.model_validate(config.model_dump() | tracking)
    beside = write_run(another, "beside the database")
    connect.__globals__["_client"].cache_clear()
    assert (read_run(elsewhere, before), read_run(another, beside)) == ("old", "beside the database")
