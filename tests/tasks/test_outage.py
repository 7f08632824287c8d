"""MLflow is away: told at once with its address, and one sentence at the end."""

import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow.exceptions import MlflowException

from hass_core.config import parse_config
from hass_core.errors import TrackingError
from tasks import tracking
from tests.flows.stack import free_port


@pytest.fixture
def impatient(monkeypatch):
    """MLflow's client asks three times, without a pause."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


@pytest.fixture
def server():
    """(address, what was asked): a server that answers 503 to everything."""
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(dict(self.headers))
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


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


def test_a_server_that_is_busy_is_asked_again_and_named(impatient, server, caplog):
    address, asked = server
    with pytest.raises(TrackingError, match=f"MLflow at {address} does not answer"):
        tracking.connect(settings_for(address))
    assert len(asked) == 3
    assert told(caplog) == [f"MLflow at {address} does not answer; it is asked again for some minutes"]


def test_an_outage_during_a_run_is_one_sentence_without_the_password():
    lost = MlflowException("API request to http://me:secret@mlflow:5000/api/2.0/mlflow/runs/get failed with exception")
    assert str(tracking.as_told(lost)).startswith("MLflow at http://mlflow:5000 does not answer")
    other = MlflowException("RESOURCE_DOES_NOT_EXIST: no such run")
    assert tracking.as_told(other) is other
