"""A Prefect server that is away or slow neither holds a stage up nor ends it, and is told with its address."""

import threading
from uuid import uuid4

import httpx
import pytest
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tasks.prefect_outage import prefect_outage_in
from tasks.progress import Reporter, say
from tests.flows.stack import free_port, wait_for
from tests.loopback import Quiet, serving


@pytest.fixture
def told():
    """What the terminal is told."""
    lines: list[str] = []
    token = say.set(lines.append)
    yield lines
    say.reset(token)


def test_a_server_that_answers_late_does_not_hold_the_work_up(told):
    asked, worked, shown = threading.Event(), threading.Event(), list[str]()

    class Slow(Quiet):
        """Answers when the work is done."""

        def do_GET(self) -> None:
            self.send(404)  # it asks for no CSRF token

        def do_PATCH(self) -> None:
            shown.append(self.body().decode())
            asked.set()
            worked.wait()
            self.send(204)

    with serving(Slow) as url, temporary_settings({PREFECT_API_URL: f"{url}/api"}), disable_run_logger():
        reporter = Reporter("draft", uuid4())
        reporter(1, 10)
        assert asked.wait(60)
        for done in range(2, 11):
            reporter(done, 10)
        worked.set()
        reporter.end(well=True)
    assert "10.0" in shown[0]
    assert "100.0" in shown[-1]
    assert told == []


def test_a_server_that_is_away_is_told_once_and_the_work_goes_on(told):
    api = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: api, PREFECT_CLIENT_MAX_RETRIES: 0}), disable_run_logger():
        reporter = Reporter("draft", uuid4())
        reporter(1, 10)
        wait_for(lambda: told, "the first miss", 60)
        reporter(10, 10)
        reporter.end(well=True)
    (line,) = told
    assert line.startswith(f"Prefect at {api} does not answer any more: start it, or change or unset PREFECT_API_URL")
    assert line.endswith("the stage draft goes on meanwhile")


def test_only_what_prefect_was_asked_for_is_called_prefect_s_outage():
    api = f"http://me:secret@127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: api}):
        for url, is_prefect_s in ((f"{api}/artifacts/", True), (f"http://127.0.0.1:{free_port()}/v1/models", False)):
            with pytest.raises(httpx.ConnectError) as caught:
                httpx.get(url)
            sentence = prefect_outage_in(caught.value)
            assert (sentence is not None) == is_prefect_s
            assert "secret" not in str(sentence)
