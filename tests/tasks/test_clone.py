"""What a run would write into the clone of the code that a worker removes after it is refused."""

import tempfile
from pathlib import Path

import pytest

from hass_core.config import parse_config
from hass_core.errors import StoreError, TrackingError
from tasks import tracking
from tasks.resources import store_of


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """The present folder: a repository cloned as Prefect's process worker has it done."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("HASS_STORE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = Path(tempfile.mkdtemp(suffix="prefect")) / "hass"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("store", [None, "results", "../results"])
def test_a_store_in_the_clone_is_refused_with_what_to_set(clone, store):
    config = parse_config({"store": store} if store else {})
    with pytest.raises(StoreError, match=r"would be gone with it: set HASS_STORE on the worker, .* whole path"):
        store_of(config)
    assert list(clone.iterdir()) == []


@pytest.mark.parametrize("values", [{}, {"store": "s3://bucket/x"}, {"tracking": {"uri": "sqlite:///runs.db"}}])
def test_so_is_a_record_in_it(clone, values):
    with pytest.raises(TrackingError, match="be gone with it: set MLFLOW_TRACKING_URI on the worker"):
        tracking.connect(parse_config(values))
    assert list(clone.iterdir()) == []


def test_a_whole_path_is_taken_and_so_is_a_folder_where_runs_are_not_cloned(clone, tmp_path, monkeypatch):
    assert store_of(parse_config({"store": str(tmp_path / "kept")})).is_local
    monkeypatch.chdir(tmp_path)
    assert store_of(parse_config({"store": "results"})).is_local
    named_alike = {"store": f"{tempfile.gettempdir()}/our-prefect/store"}
    assert store_of(parse_config(named_alike)).is_local
