"""MLflow is away: told at once with its address, and one sentence at the end."""

import logging

import pytest
from mlflow.exceptions import MlflowException

from hass_core.config import parse_config
from hass_core.errors import TrackingError
from tasks import tracking
from tests.flows.stack import free_port
from tests.loopback import answering


@pytest.fixture
def impatient(monkeypatch):
    """MLflow's client asks three times, without a pause."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


def settings_for(uri: str):
    return parse_config({"name": "test", "tracking": {"uri": uri}})


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "urllib3.connectionpool"]


def test_a_server_that_is_not_there_is_told_once_and_ends_in_one_sentence(impatient, caplog):
    caplog.set_level(logging.DEBUG)
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TrackingError, match=f"^MLflow at {address} does not answer: start it or change tracking.uri"):
        tracking.connect(settings_for(address))
    assert told(caplog) == [f"MLflow at {address} does not answer; it is asked again for some minutes"]


def test_it_is_told_too_where_no_log_is_shown_as_for_hass_chat(impatient, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TrackingError):
        tracking.connect(settings_for(address))
    assert capsys.readouterr().err == f"MLflow at {address} does not answer; it is asked again for some minutes\n"


def test_a_server_that_is_busy_is_asked_again_and_named(impatient, caplog):
    asked: list[dict[str, str]] = []
    with answering(503, asked=asked) as address, pytest.raises(TrackingError, match=f"{address} does not answer"):
        tracking.connect(settings_for(address))
    assert len(asked) == 3
    assert told(caplog) == [f"MLflow at {address} does not answer; it is asked again for some minutes"]


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, "You are not authenticated.", "refuses this machine: set MLFLOW_TRACKING_USERNAME"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}', "refuses this machine"),
        (404, '{"detail": "Not Found"}', "is no MLflow server"),
        (404, "<html>nginx</html>", r"is no MLflow server \(status 404\)"),
        (200, "<html>Welcome</html>", "is no MLflow server"),
    ],
)
def test_what_is_no_mlflow_or_lets_nobody_in_is_told(impatient, status, body, told):
    with answering(status, body) as address, pytest.raises(TrackingError, match=f"{address} {told}") as caught:
        tracking.connect(settings_for(address))
    assert "<html>" not in str(caught.value)


def test_an_outage_during_a_run_is_one_sentence_without_the_password():
    lost = MlflowException("API request to http://me:secret@mlflow:5000/api/2.0/mlflow/runs/get failed with exception")
    assert str(tracking.outage_or(lost)).startswith("MLflow at http://mlflow:5000 does not answer")
    other = MlflowException("RESOURCE_DOES_NOT_EXIST: no such run")
    assert tracking.outage_or(other) is other


def test_a_full_disk_under_the_database_is_one_sentence():
    full = MlflowException(
        "(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT INTO registered_models …]"
    )
    assert str(tracking.outage_or(full)).startswith("the disk with MLflow's database is full: make room")
