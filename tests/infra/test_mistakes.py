"""What an operator can mend ends a program of infra/ in one sentence with status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import s3fs

from hass_core.errors import ConfigError, StoreError, TrackingError
from infra import buckets, exporter, mlflow_user
from tests.flows.stack import free_port
from tests.loopback import answering

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mlflow_of(monkeypatch):
    """Name a server and passwords as compose.yaml does; MLflow's client asks once."""

    def name(uri: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_WORKER_PASSWORD", "secret")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    return name


def test_deploying_without_a_server_says_how_to_name_one(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment["PREFECT_HOME"] = str(tmp_path)
    command = [sys.executable, "-m", "infra.deploy"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: PREFECT_API_URL is not set")
    assert len(done.stderr.splitlines()) == 1


def test_buckets_of_a_store_that_is_away_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["buckets", "save", str(tmp_path)])
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL is not set"):
        buckets.main()
    endpoint = f"http://127.0.0.1:{free_port()}"
    for name, value in (("ENDPOINT_URL", endpoint), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(StoreError, match=f"cannot copy between {tmp_path} and the buckets hass, mlflow of {endpoint}"):
        buckets.main()


def test_a_folder_that_is_no_copy_of_the_buckets_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["buckets", "load", str(tmp_path / "mistyped")])
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=f"{tmp_path}/mistyped is no copy of the buckets: it has no folder hass or"):
        buckets.main()


def test_the_exporter_names_a_port_that_is_taken():
    with answering(200) as url, pytest.raises(ConfigError, match=r"cannot listen on .*: address already in use;"):
        exporter.main(["--port", url.rpartition(":")[2]])


def test_the_worker_s_user_is_not_made_where_mlflow_is_away_or_refuses(mlflow_of):
    mlflow_of(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError, match="does not answer"):
        mlflow_user.main()
    with answering(401, "You are not authenticated.") as url:
        mlflow_of(url)
        with pytest.raises(TrackingError, match=f"MLflow at {url} refuses this machine: set MLFLOW_TRACKING_USERNAME"):
            mlflow_user.main()
