"""The OpenAI engine against a real server process that fails on purpose."""

import gc
import json
import os
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from hass_core.config import ResponsesConfig, SamplingShare
from hass_core.data.engines.base import Completion, Request, RequestQueue
from hass_core.data.engines.openai import OpenAIEngine, backoff_seconds
from hass_core.data.engines.replies import Reply, says, without_refused
from hass_core.data.templates import decode, encode_prompt
from hass_core.errors import ConfigError, TargetError

REQUESTS = int(os.environ.get("HASS_TEST_REQUESTS", "300"))


@contextmanager
def chat_server(*words: str):
    """A server's process and its address."""
    command = [sys.executable, str(Path(__file__).with_name("chat_server.py")), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.kill()


@pytest.fixture(scope="module")
def server_url():
    with chat_server() as (_, url):
        yield url


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


def test_a_refusal_quotes_the_server(server_url, tiny_target, monkeypatch):
    monkeypatch.setattr("hass_core.data.engines.openai.FIRST_PAUSE_SECONDS", 0.01)
    found = ask(server_url, tiny_target, ["refuse this", "fine"])
    assert (found["refuse this"].error, found["refuse this"].detail) == ("server answered 400", "'on purpose'")


ODD = {
    "html": ("the server's reply is not JSON", "'warming up'"),
    "empty": ("the server's reply holds no answer", """'{"choices": []}'"""),
    "object": ("the server's reply is an error", "'the provider failed'"),
}


@pytest.mark.parametrize("kind", ODD)
def test_one_odd_reply_is_asked_again_and_a_lasting_one_is_an_error_on_its_conversation(
    server_url, tiny_target, monkeypatch, kind
):
    monkeypatch.setattr("hass_core.data.engines.openai.FIRST_PAUSE_SECONDS", 0.01)
    found = ask(server_url, tiny_target, [f"{kind} once", f"{kind} always", "fine"])
    assert found[f"{kind} once"].error is None
    assert (found[f"{kind} always"].error, found[f"{kind} always"].detail) == ODD[kind]


def test_first_failures_that_are_all_alike_stop_the_run_and_are_not_handed_on(server_url, tiny_target, monkeypatch):
    monkeypatch.setattr("hass_core.data.engines.openai.FIRST_PAUSE_SECONDS", 0.01)
    seen = []
    queue = RequestQueue(request(f"html always {i}", tiny_target) for i in range(500))
    with pytest.raises(TargetError, match=r"no prompt was answered: 8 × .* \(it said: 'warming up'\)"):
        seen.extend(engine(server_url, tiny_target, concurrency=4).complete(queue))
    assert seen == []
    assert len(queue.take(500)) > 450


def test_a_server_that_answers_no_more_stops_the_run_and_what_it_failed_at_is_left_to_the_next(
    server_url, tiny_target, monkeypatch
):
    monkeypatch.setattr("hass_core.data.engines.openai.FIRST_PAUSE_SECONDS", 0.01)
    seen = []
    queue = RequestQueue(request(question, tiny_target) for question in ["fine", *(f"down {i}" for i in range(99))])
    with pytest.raises(TargetError, match=r"answers no more: 8 × server answered 503 .* finished answers are kept"):
        seen.extend(engine(server_url, tiny_target, concurrency=1).complete(queue))
    assert [completion.key for completion in seen] == ["fine"]
    assert len(queue.take(99)) == 91


def test_conversations_that_a_server_refuses_one_after_the_other_do_not_stop_it(server_url, tiny_target):
    found = ask(server_url, tiny_target, ["fine", *(f"refuse {i}" for i in range(20)), "well"], concurrency=1)
    assert sum(completion.error == "server answered 400" for completion in found.values()) == 20
    assert found["well"].finished


def test_a_redirection_is_told_and_not_followed(server_url, tiny_target):
    with pytest.raises(TargetError, match=r"server answered 307 \(it said: 'moved to http://evil\.example/v1'\)"):
        ask(server_url, tiny_target, [f"moved {i}" for i in range(8)])


def test_a_reply_that_comes_a_byte_now_and_then_is_given_up_without_noise(
    server_url, tiny_target, monkeypatch, capfd, caplog
):
    for name, value in (("FIRST_PAUSE_SECONDS", 0.01), ("TIMEOUT_SECONDS", 0.2), ("MAX_ATTEMPTS", 2)):
        monkeypatch.setattr(f"hass_core.data.engines.openai.{name}", value)
    with pytest.raises(TargetError, match=r"cannot be reached: TimeoutError"):
        ask(server_url, tiny_target, [f"dripping {i}" for i in range(6)])
    gc.collect()  # asyncio complains of failures that nobody looked at
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_several_models_are_not_guessed_between(server_url, tiny_target):
    with pytest.raises(TargetError, match=r"has the models tiny, other; say in responses\.server_model"):
        ask(f"{server_url.removesuffix('/v1')}/two/v1", tiny_target, ["hello"])


def test_the_servers_token_ids_are_taken_only_where_they_are_those_of_its_text(server_url, tiny_target):
    tokenizer = tiny_target.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = tokenizer("another text")["input_ids"]
    questions = [f"ids {' '.join(map(str, ids))}" for ids in ([*other, end], [*other, 10**9, end], other)]
    for question, completion in ask(server_url, tiny_target, questions).items():
        assert decode(tokenizer, completion.token_ids) == f"You said: {question} (T=0.5)<|im_end|>"


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "same"),
    [
        (" Yes. ", "Yes.", "", True),
        ("<think>\nHm\n</think>\n\nYes.", "Yes.", "Hm", True),
        ("<think>\nHm\n</think>\n\nYes.", "Yes.", "", True),  # the server keeps its thoughts to itself
        ("Yes.", "Yes.", "Hm", False),
        ("No.", "Yes.", "", False),
        ("caf\u0065\u0301", "caf\u00e9", "", True),
        ("half a \N{REPLACEMENT CHARACTER}", "half a ", "", True),
    ],
)
def test_a_text_is_what_a_reply_says(text, content, reasoning, same):
    assert says(text, Reply(content, reasoning, True, [])) == same


def test_a_field_that_the_server_does_not_know_is_left_out_and_one_that_decides_the_answer_is_not(
    server_url, tiny_target
):
    found = ask(server_url, tiny_target, ["seedless fields?", "new style fields?"], concurrency=1)
    tokenizer = tiny_target.tokenizer
    first, second = (decode(tokenizer, completion.token_ids) for completion in found.values())
    assert first == "max_tokens messages model return_token_ids temperature top_p<|im_end|>"
    assert second == "max_completion_tokens messages model return_token_ids temperature top_p<|im_end|>"
    assert without_refused({"top_k": 5, "top_p": 0.9}, "unknown argument top_k") is None


def test_content_in_parts_is_text_and_a_call_is_no_answer(server_url, tiny_target):
    found = ask(server_url, tiny_target, ["in parts", "call it"])
    assert decode(tiny_target.tokenizer, found["in parts"].token_ids).startswith("You said: in parts")
    assert found["call it"].error == "tool call in the answer"


def test_the_key_goes_only_to_hosts_that_are_trusted(server_url, tiny_target, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    said = [decode(tiny_target.tokenizer, ask(server_url, tiny_target, ["key?"])["key?"].token_ids)]
    monkeypatch.setattr("hass_core.trusted_hosts.is_loopback", lambda host: False)
    said.append(decode(tiny_target.tokenizer, ask(server_url, tiny_target, ["key?"])["key?"].token_ids))
    monkeypatch.setenv("HASS_TRUSTED_HOSTS", "example.org,127.0.0.1")
    said.append(decode(tiny_target.tokenizer, ask(server_url, tiny_target, ["key?"])["key?"].token_ids))
    assert said == ["key Bearer secret<|im_end|>", "key None<|im_end|>", "key Bearer secret<|im_end|>"]


def test_a_refusal_says_that_the_key_was_kept_back(server_url, tiny_target, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr("hass_core.trusted_hosts.is_loopback", lambda host: False)
    with pytest.raises(TargetError, match=r"OPENAI_API_KEY was not sent, for HASS_TRUSTED_HOSTS does not name 127\.0"):
        ask(server_url, tiny_target, [f"refuse {i}" for i in range(10)])


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


def test_the_list_of_models_is_asked_for_again_and_a_refusal_of_it_quoted(server_url, tiny_target, monkeypatch):
    monkeypatch.setattr("hass_core.data.engines.openai.FIRST_PAUSE_SECONDS", 0.01)
    root = server_url.removesuffix("/v1")
    assert ask(f"{root}/warming/v1", tiny_target, ["hello"])["hello"].error is None
    with pytest.raises(TargetError, match=r"does not list its models: status 401, it said 'no key, no models'; check"):
        ask(f"{root}/closed/v1", tiny_target, ["hello"])


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


def of_several(urls: list[str], target, concurrency: int = 8, **more: object) -> OpenAIEngine:
    first, *others = urls
    settings = {
        "engine": "openai",
        "server_url": first,
        "more_servers": others,
        "server_concurrency": concurrency,
        **more,
    }
    return OpenAIEngine(ResponsesConfig.model_validate(settings), target.tokenizer)


@pytest.mark.slow
def test_several_servers_lose_and_double_nothing_when_one_is_sick_and_one_dies(tiny_target, monkeypatch, caplog):
    monkeypatch.setattr("hass_core.data.engines.openai.FIRST_PAUSE_SECONDS", 0.01)
    words = ("hello", "busy", "broken", "refuse", "html")
    questions = [f"{words[i % 5]} {i}" for i in range(REQUESTS)]
    with chat_server() as (_, sound), chat_server("sick") as (_, sick), chat_server() as (dying, mortal):
        queue = RequestQueue(request(question, tiny_target) for question in questions)
        found: list[Completion] = []
        for completion in of_several([sick, mortal, sound], tiny_target).complete(queue):
            found.append(completion)
            if len(found) == REQUESTS // 4:
                dying.kill()
    assert sorted(completion.key for completion in found) == sorted(questions)
    errors = {completion.key.split()[0]: completion.error for completion in found}
    assert errors == {word: "server answered 400" if word == "refuse" else None for word in words}
    dropped = [record.args[0] for record in caplog.records if "is dropped" in record.message]
    assert sorted(dropped) == sorted([sick, mortal])


def test_work_goes_to_the_server_with_least_to_do(tiny_target):
    with chat_server() as (_, one), chat_server() as (_, other):
        queue = RequestQueue(request(f"question {i}", tiny_target) for i in range(60))
        assert len(list(of_several([one, other], tiny_target, concurrency=4).complete(queue))) == 60
        answered = []
        for url in (one, other):
            with urllib.request.urlopen(f"{url}/state") as reply:
                answered.append(json.load(reply)["answered"])
    assert sum(answered) == 60
    assert min(answered) >= 15


def test_servers_of_different_models_are_refused_unless_one_is_named(tiny_target):
    with chat_server() as (_, one), chat_server("other") as (_, two):
        with pytest.raises(TargetError, match=r"the servers have different models: .* has tiny, .* has other; say in"):
            list(of_several([one, two], tiny_target).complete(RequestQueue([request("hello", tiny_target)])))
        named = of_several([one, two], tiny_target, server_model="tiny")
        assert len(list(named.complete(RequestQueue([request("hello", tiny_target)])))) == 1


def test_a_server_that_is_not_there_at_the_beginning_is_named_and_the_others_answer(server_url, tiny_target, caplog):
    engine = of_several(["http://127.0.0.1:9/v1", server_url], tiny_target)
    assert [c.error for c in engine.complete(RequestQueue([request("fine and well", tiny_target)]))] == [None]
    assert "the server http://127.0.0.1:9/v1 is dropped, 1 are left" in caplog.text
