"""The OpenAI engine against a real server process that fails on purpose."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from hass_core.config import ResponsesConfig, SamplingShare
from hass_core.data.engines.base import Completion, Request, RequestQueue
from hass_core.data.engines.openai import OpenAIEngine, backoff_seconds
from hass_core.data.templates import decode, encode_prompt
from hass_core.errors import ConfigError, TargetError


@pytest.fixture(scope="module")
def server_url():
    command = [sys.executable, str(Path(__file__).with_name("chat_server.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.kill()


def engine(url: str, target, concurrency: int = 8) -> OpenAIEngine:
    settings = ResponsesConfig(engine="openai", server_url=url, server_concurrency=concurrency)
    return OpenAIEngine(settings, target.tokenizer)


def request(question: str, target) -> Request:
    messages = ({"role": "user", "content": question},)
    return Request(question, encode_prompt(target.tokenizer, messages), SamplingShare(temperature=0.5), 50, 1, messages)


def ask(url: str, target, questions: list[str], concurrency: int = 8) -> dict[str, Completion]:
    queue = RequestQueue(request(question, target) for question in questions)
    return {c.key: c for c in engine(url, target, concurrency).complete(queue)}


def test_answers_come_back_as_token_ids_with_their_end(server_url, tiny_target):
    found = ask(server_url, tiny_target, ["hello", "long story"])
    tokenizer = tiny_target.tokenizer
    assert decode(tokenizer, found["hello"].token_ids) == "You said: hello (T=0.5)<|im_end|>"
    assert found["hello"].finished
    assert decode(tokenizer, found["long story"].token_ids) == "You said: long story (T=0.5)"
    assert not found["long story"].finished


def test_passing_faults_are_repeated_and_lasting_ones_become_errors(server_url, tiny_target, monkeypatch):
    monkeypatch.setattr("hass_core.data.engines.openai.FIRST_PAUSE_SECONDS", 0.01)
    found = ask(server_url, tiny_target, ["busy one", "broken two", "refuse three", "down four", "fine five"])
    assert {key: completion.error for key, completion in found.items()} == {
        "busy one": None,
        "broken two": None,
        "refuse three": "server answered 400",
        "down four": "server answered 503",
        "fine five": None,
    }


def test_no_more_requests_are_in_flight_than_allowed(server_url, tiny_target):
    ask(server_url, tiny_target, [f"question {i}" for i in range(30)], concurrency=3)
    with urllib.request.urlopen(f"{server_url}/state") as reply:
        assert 2 <= json.load(reply)["most"] <= 8  # 8 by the tests before


def test_a_next_turn_put_in_front_is_answered(server_url, tiny_target):
    queue = RequestQueue([request("first", tiny_target)])
    keys = []
    for completion in engine(server_url, tiny_target).complete(queue):
        keys.append(completion.key)
        if completion.key == "first":
            queue.put_first(request("second", tiny_target))
    assert keys == ["first", "second"]


def test_a_server_that_is_not_there_is_named(tiny_target):
    with pytest.raises(TargetError, match=r"the server http://127.0.0.1:9/v1 does not list its models: .*; check"):
        ask("http://127.0.0.1:9/v1", tiny_target, ["hello"])


def test_a_server_that_goes_away_stops_the_run(server_url, tiny_target, monkeypatch):
    monkeypatch.setattr("hass_core.data.engines.openai.FIRST_PAUSE_SECONDS", 0.01)
    settings = ResponsesConfig(engine="openai", server_url="http://127.0.0.1:9/v1", server_model="tiny")
    queue = RequestQueue([request("hello", tiny_target)])
    with pytest.raises(
        TargetError, match=r"cannot be reached: .* run the same command again, finished answers are kept"
    ):
        list(OpenAIEngine(settings, tiny_target.tokenizer).complete(queue))


def test_an_engine_without_an_address_is_refused(tiny_target):
    with pytest.raises(ConfigError, match=r"responses\.server_url is empty"):
        OpenAIEngine(ResponsesConfig(), tiny_target.tokenizer)


def test_pauses_grow_and_obey_the_server():
    assert backoff_seconds(0, "2") == 2.0
    assert backoff_seconds(0, "9999") == 60.0
    assert 0.25 <= backoff_seconds(0, None) <= 0.5
    assert 4.0 <= backoff_seconds(4, "Wed, 21 Oct 2026 07:28:00 GMT") <= 8.0
