"""`hass serve` through OpenAI's own client: answers, streams, limits, refusals, and nobody's place kept in vain."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from hass_core.config import SamplingConfig
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder
from hass_core.serving.service import Limits
from hass_core.target_model.runner import make_runner
from tests.flows.stack import answers, free_port, wait_for
from tests.serving.conftest import serving

QUESTION = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture
def client(server) -> OpenAI:
    return OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, messages=QUESTION, **more):
    return client.chat.completions.create(model="tiny", messages=messages, **({"temperature": 0} | more))


def streamed(client: OpenAI, **more) -> list:
    return list(ask(client, stream=True, **more))


def plain_tokens(target, prompt: list[int], new_tokens: int) -> list[int]:
    decoder = PlainDecoder(make_runner(target))
    return decoder.generate([prompt], SamplingConfig(), new_tokens, StopRule.of(target))[0].token_ids


def test_a_greedy_answer_is_the_plain_one_with_its_counts(client, tiny_target):
    prompt = encode_prompt(tiny_target.tokenizer, QUESTION)
    expected = plain_tokens(tiny_target, prompt, 30)
    answer = ask(client, max_tokens=30)
    assert answer.choices[0].message.content == tiny_target.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected)
    assert answer.usage.total_tokens == len(prompt) + len(expected)
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_a_streamed_answer_joins_to_the_whole_one(client):
    whole = ask(client, max_tokens=40)
    chunks = streamed(client, max_tokens=40, stream_options={"include_usage": True})
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions_take_text_and_token_ids(client, tiny_target):
    ids = tiny_target.tokenizer("Once upon a time")["input_ids"]
    asked = {"model": "tiny", "max_tokens": 20, "temperature": 0}
    from_text = client.completions.create(prompt="Once upon a time", **asked)
    from_ids = client.completions.create(prompt=ids, **asked)
    assert from_text.choices[0].text == from_ids.choices[0].text
    assert from_text.usage.prompt_tokens == len(ids)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client):
    whole = ask(client, max_tokens=60).choices[0].message.content
    stop = whole[10:13]
    answer = ask(client, max_tokens=60, stop=[stop]).choices[0]
    chunks = [chunk.choices[0] for chunk in streamed(client, max_tokens=60, stop=stop)]
    assert (
        answer.message.content == "".join(chunk.delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]
    )
    assert answer.finish_reason == chunks[-1].finish_reason == "stop"


def test_a_seed_gives_the_same_answer_again_and_no_seed_another(client):
    first, second = (ask(client, temperature=1, seed=5, max_tokens=30).choices[0].message.content for _ in range(2))
    assert first == second
    others = {ask(client, temperature=1, max_tokens=30).choices[0].message.content for _ in range(3)}
    assert len(others) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 500}, "max_tokens is 500; this server allows 200"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"n": 2}, "n: Input should be 1"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "the model's context holds 512"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"model": "gpt"}, "no model 'gpt' here; this server has 'tiny'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_in_words(client, wrong, message, stream):
    request = {"model": "tiny", "messages": QUESTION, "stream": stream} | wrong
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        client.chat.completions.create(**request)


def test_a_body_too_large_is_refused_announced_or_not(server):
    url = f"{server[0]}/v1/chat/completions"
    large = b'{"messages": [{"role": "user", "content": "' + b"x" * 30_000 + b'"}]}'
    assert httpx.post(url, content=large).status_code == 413
    unannounced = httpx.post(url, content=iter([large[:15_000], large[15_000:]]))
    assert unannounced.status_code == 413
    assert "larger than 20000 bytes" in unannounced.json()["error"]["message"]


def test_the_key_is_asked_for_and_other_hosts_are_turned_away(tiny_target):
    with serving(tiny_target, key="open sesame", hosts=["127.0.0.1"]) as (url, _):
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
            ask(OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0), max_tokens=2)
        assert ask(OpenAI(base_url=f"{url}/v1", api_key="open sesame"), max_tokens=2).choices
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer open sesame"}).status_code == 200
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 400


def test_64_clients_at_once_lose_no_request(client, tiny_target):
    questions = [[{"role": "user", "content": f"Question {n}"}] for n in range(64)]
    with ThreadPoolExecutor(64) as threads:
        found = list(threads.map(lambda q: ask(client, q, max_tokens=12).choices[0].message.content, questions))
    for question, text in list(zip(questions, found, strict=True))[::8]:
        prompt = encode_prompt(tiny_target.tokenizer, question)
        assert text == tiny_target.tokenizer.decode(plain_tokens(tiny_target, prompt, 12), skip_special_tokens=True)


def test_a_full_line_sends_others_away_for_later(tiny_target):
    with serving(tiny_target, Limits(max_new_tokens=400, max_running=1, max_waiting=1)) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(8) as threads:
            asked = [threads.submit(ask, client, max_tokens=300) for _ in range(8)]
            outcomes = [future.exception() for future in asked]
        refused = [error for error in outcomes if error]
        assert 1 <= len(refused) <= 6
        assert all(isinstance(error, openai.RateLimitError) for error in refused)
        assert refused[0].response.headers["Retry-After"] == "5"


def leave(url: str, body: dict) -> None:
    """Ask, and hang up before the answer is complete."""
    if body["stream"]:
        with httpx.stream("POST", url, json=body) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
        return
    with pytest.raises(httpx.TimeoutException):
        httpx.post(url, json=body, timeout=0.3)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(tiny_target, stream):
    with serving(tiny_target, Limits(max_new_tokens=490, max_running=1)) as (url, service):
        body = {"messages": QUESTION, "max_tokens": 450, "temperature": 1, "stream": stream}
        cycle = service._worker._advance
        service._worker._advance = lambda job: (time.sleep(0.05), cycle(job))[1]
        leave(f"{url}/v1/chat/completions", body)
        wait_for(lambda: service._worker.running == 0, "the place to be free", 5)
        assert 'hass_requests_total{outcome="cancelled"} 1.0' in httpx.get(f"{url}/metrics").text


def test_metrics_tell_what_was_decoded(tiny_target):
    from prometheus_client.parser import text_string_to_metric_families

    with serving(tiny_target) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        used = [ask(client, max_tokens=25).usage for _ in range(3)]
        text = httpx.get(f"{url}/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    values = {s.name: s.value for s in samples if not s.labels}
    accepted = sum(s.value for s in samples if s.name == "hass_accepted_total")
    assert values["hass_generated_tokens_total"] == sum(usage.completion_tokens for usage in used)
    assert values["hass_prompt_tokens_total"] == sum(usage.prompt_tokens for usage in used)
    # each cycle gives one token more than it accepts, and each answer's first token comes before its first cycle
    assert values["hass_cycles_total"] > 0
    assert values["hass_tau"] == 1 + accepted / values["hass_cycles_total"]
    assert values["hass_cycles_total"] + accepted + len(used) >= values["hass_generated_tokens_total"]
    assert values["hass_tokens_per_second"] > 0
    assert values["hass_requests_running"] == 0


def test_the_command_serves_and_stops(tiny_target, tmp_path):
    tiny_target.model.save_pretrained(tmp_path / "tiny")
    tiny_target.tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "key").write_text("secret\n")
    port = free_port()
    hass = str(Path(sys.executable).with_name("hass"))
    options = ["--target", str(tmp_path / "tiny"), "--port", str(port), "--api-key-file", str(tmp_path / "key")]
    process = subprocess.Popen(
        [hass, "serve", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), "the server", 60)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret")
        (model,) = client.models.list().data
        answer = client.chat.completions.create(model=model.id, messages=QUESTION, max_tokens=5)
        assert answer.usage.completion_tokens <= 5
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def test_an_open_address_without_a_key_is_refused():
    hass = str(Path(sys.executable).with_name("hass"))
    done = subprocess.run([hass, "serve", "--host", "0.0.0.0"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "0.0.0.0 is reachable by others: set HASS_API_KEY" in " ".join(done.stderr.split())
