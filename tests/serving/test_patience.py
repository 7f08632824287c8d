"""Nobody waits for ever: half-sent requests, a long line and a dead decoder end in an answer, on real sockets."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from hass_core.serving import connection
from hass_core.serving.service import Limits
from tests.flows.stack import wait_for
from tests.serving.conftest import post, serving

QUESTION = {"messages": [{"role": "user", "content": "Name three rivers."}], "temperature": 1}


def said_to(url: str, data: bytes, timeout: float = 20) -> bytes:
    """All that the server answers to these bytes, until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as client:
        client.sendall(data)
        answer = b""
        while piece := client.recv(4096):
            answer += piece
        return answer


def test_a_half_sent_body_is_refused_after_its_time(tiny_target):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(tiny_target, Limits(max_body_seconds=0.3)) as (url, _):
        announced = said_to(url, head + b'Content-Length: 500\r\n\r\n{"messages": [')
        chunked = said_to(url, head + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mes\r\n')
        assert announced.startswith(b"HTTP/1.1 408")
        assert chunked.startswith(b"HTTP/1.1 408")
        assert b"has not arrived within 0.3 seconds" in announced
        assert post((url,), QUESTION | {"max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/comp", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-"])
def test_a_half_sent_head_closes_the_connection(tiny_target, monkeypatch, sent):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with serving(tiny_target) as (url, _):
        assert said_to(url, sent) == b""


def test_a_second_request_half_sent_on_an_open_connection_closes_it_too(tiny_target, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with serving(tiny_target) as (url, _):
        answer = said_to(url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        assert answer.count(b"HTTP/1.1 200") == 1


def test_a_long_answer_outlasts_the_time_for_heads_and_bodies(tiny_target, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    with serving(tiny_target, Limits(max_body_seconds=0.2)) as (url, service):
        slowed(service, 0.1)
        assert post((url,), QUESTION | {"max_tokens": 12, "seed": 1}).status_code == 200


def slowed(service, seconds: float) -> None:
    """Each cycle of the worker takes so much longer."""
    cycle = service._worker._advance
    service._worker._advance = lambda job: (time.sleep(seconds), cycle(job))[1]


def test_a_request_that_was_in_line_for_too_long_is_sent_away(tiny_target):
    with serving(tiny_target, Limits(max_new_tokens=490, max_running=1, max_wait_seconds=0.5)) as (url, service):
        slowed(service, 0.1)
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(post, (url,), QUESTION | {"max_tokens": 40, "seed": 1})
            wait_for(lambda: service._worker.running == 1, "the first request to run", 10)
            second = post((url,), QUESTION | {"max_tokens": 2})
            assert second.status_code == 503
            assert second.headers["Retry-After"] == "5"
            assert "in line for 0.5 seconds" in second.json()["error"]["message"]
            assert service._worker.waiting == 0
            assert first.result().status_code == 200


def test_who_leaves_the_line_frees_its_place_in_it(tiny_target):
    limits = Limits(max_new_tokens=490, max_running=1, max_waiting=1)
    with serving(tiny_target, limits) as (url, service):
        slowed(service, 0.1)
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(post, (url,), QUESTION | {"max_tokens": 40, "seed": 1})
            wait_for(lambda: service._worker.running == 1, "the first request to run", 10)
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=0.3)
            wait_for(lambda: service._worker.waiting == 0, "the line to be empty", 5)
            assert first.result().status_code == 200


def dying(step) -> None:
    raise SystemError("out of luck")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_decoder_is_told_to_all_and_makes_the_server_unhealthy(tiny_target):
    with serving(tiny_target, Limits(max_running=1)) as (url, service):
        assert httpx.get(f"{url}/health").status_code == 200
        slowed(service, 0.2)
        service._worker._observe = dying
        with ThreadPoolExecutor(3) as threads:
            answers = list(threads.map(lambda _: post((url,), QUESTION | {"max_tokens": 20}), range(3)))
        assert [answer.status_code for answer in answers] == [503, 503, 503]
        assert "died of SystemError: out of luck" in answers[0].json()["error"]["message"]
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503
        assert "died of SystemError" in health.json()["status"]
        assert post((url,), QUESTION).status_code == 503


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stream_under_way_ends_with_the_error_when_the_decoder_dies(tiny_target):
    with serving(tiny_target) as (url, service):
        slowed(service, 0.1)
        body = QUESTION | {"max_tokens": 100, "stream": True, "seed": 1}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            service._worker._observe = dying
            rest = "".join(lines)
    assert '"type": "server_error"' in rest
    assert rest.endswith("data: [DONE]")
