"""Requests that would be answered otherwise than asked are refused by the field's name; none is a traceback."""

import json

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI

from hass_core.data.templates import encode_prompt
from hass_core.serving.protocol import ChatRequest, CompletionRequest
from tests.conftest import byte_tokenizer
from tests.serving.conftest import JSON_TYPE, post

QUESTION = [{"role": "user", "content": "Name three rivers."}]
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "tide", "arguments": '{"place": "Brest"}'}}
HISTORY = [
    *QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "high"},
]


@pytest.fixture
def client(server) -> OpenAI:
    return OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [TOOL["function"]]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True, "top_logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"5": -100}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"n": 2}, "n"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"stream": "yes"}, "stream"),
        ({"max_tokens": 4.5}, "max_tokens"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"max_token": 5}, "max_token"),
        ({"stop": "\ud83d"}, "stop"),
        ({"stop": ["ok", "\ud83d"]}, "stop.list.1: holds half of a surrogate pair"),
        ({"temperature": 1e-300}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": [{"role": "user", "content": "Broken \ud83d half"}]}, "messages.0.content.text: holds half of a"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "Hi", "images": []}]}, "messages.0.images"),
        ({"messages": [{"role": "function", "name": "f", "content": "1"}]}, "messages.0.role"),
        ({"messages": HISTORY}, "messages.1.tool_calls.0.name"),
        ({"messages": [*QUESTION, {"role": "user", "name": "Ann", "content": "Hi"}]}, "messages.1.name"),
        ({"messages": [{"role": "assistant", "content": "1", "reasoning_content": "so"}]}, "messages.0.reasoning"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(server, more, field):
    answer = post(server, {"messages": QUESTION, "max_tokens": 4} | more)
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "field"),
    [({"echo": True}, "echo"), ({"logprobs": 0}, "logprobs"), ({"best_of": 3}, "best_of"), ({"suffix": "x"}, "suffix")],
)
def test_a_completion_refuses_what_it_does_not_serve(server, more, field):
    answer = post(server, {"prompt": "Once", "max_tokens": 4} | more, "completions")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_two_limits_that_differ_are_refused_and_equal_ones_taken(server):
    told = post(server, {"messages": QUESTION, "max_tokens": 5, "max_completion_tokens": 6})
    assert told.status_code == 400
    assert "max_tokens and max_completion_tokens differ" in told.json()["error"]["message"]
    assert post(server, {"messages": QUESTION, "max_tokens": 5, "max_completion_tokens": 5}).status_code == 200


def test_a_misspelt_field_is_told_with_the_nearest(server):
    told = post(server, {"messages": QUESTION, "max_token": 5}).json()["error"]
    assert told["message"] == "max_token: this server knows no such field; did you mean max_tokens?"
    assert told["param"] == "max_token"


def test_a_field_of_the_other_endpoint_is_not_offered_as_its_own_correction(server):
    told = post(server, {"messages": QUESTION, "max_tokens": 4, "echo": True}).json()["error"]
    assert told["message"] == "echo: not supported here; leave it out"


def test_null_means_the_default_for_every_field(server):
    for kind, model, asked in (
        ("chat/completions", ChatRequest, {"messages": QUESTION}),
        ("completions", CompletionRequest, {"prompt": "Once"}),
    ):
        fixed = {"max_tokens": 6, "temperature": 0}
        nothing = dict.fromkeys(model.model_fields.keys() - asked.keys() - fixed.keys())
        plain, nulls = (post(server, asked | fixed | more, kind).json() for more in ({}, nothing))
        assert nulls["choices"] == plain["choices"]
    assert post(server, {"messages": QUESTION, "temperature": None, "max_tokens": 2}).status_code == 200


def test_what_asks_for_nothing_or_changes_nothing_is_taken_from_the_official_client(client):
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=4, temperature=0, n=1, logprobs=False, frequency_penalty=0,
        presence_penalty=0.0, logit_bias={}, response_format={"type": "text"}, tool_choice="none", tools=[],
        user="me", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True,
        prompt_cache_key="k", safety_identifier="s", modalities=["text"],
    )  # fmt: skip
    assert answer.choices[0].message.content is not None
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=4, stream=True,
            stream_options={"include_usage": True, "include_obfuscation": False},
        )
    )  # fmt: skip
    assert chunks[-1].usage.completion_tokens <= 4


def test_the_official_client_reads_the_name_of_what_is_refused(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=QUESTION, tools=[TOOL])
    assert refused.value.param == "tools"


def test_parts_of_a_message_are_lines_of_it(client):
    parts = [{"type": "text", "text": text} for text in ("Name three rivers.", "Briefly.")]
    texts = [
        client.chat.completions.create(
            model="tiny", max_tokens=6, temperature=0, messages=[{"role": "user", "content": content}]
        )
        for content in (parts, "Name three rivers.\nBriefly.")
    ]
    assert texts[0].usage.prompt_tokens == texts[1].usage.prompt_tokens
    assert texts[0].choices[0].message.content == texts[1].choices[0].message.content


def test_a_developer_speaks_as_the_system(client):
    texts = [
        client.chat.completions.create(
            model="tiny", max_tokens=12, temperature=0, messages=[{"role": role, "content": "Be brief."}, *QUESTION]
        )
        for role in ("developer", "system")
    ]
    assert texts[0].usage.prompt_tokens == texts[1].usage.prompt_tokens
    assert texts[0].choices[0].message.content == texts[1].choices[0].message.content


def test_tools_of_the_history_reach_a_template_that_writes_them(tool_server):
    url, target = tool_server
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="tiny", messages=HISTORY, max_tokens=4, temperature=0)
    rendered = [QUESTION[0], {**HISTORY[1], "content": '[tide {"place": "Brest"}]', "tool_calls": []}, HISTORY[2]]
    assert answer.usage.prompt_tokens == len(encode_prompt(target.tokenizer, rendered))
    broken = CALL | {"function": {"name": "tide", "arguments": "{place:"}}
    for calls, said in (([broken], "arguments: not valid JSON"), ([], "content: missing or null")):
        asked = [*QUESTION, HISTORY[1] | {"tool_calls": calls}]
        with pytest.raises(openai.BadRequestError, match=said):
            client.chat.completions.create(model="tiny", messages=asked, max_tokens=4)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"messages": ', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"messages": "\xff"}', "error parsing"),
        (b"[" * 100_000, "larger than 20000 bytes"),
        (b"[" * 10_000, ""),
        (b'{"messages": [{"role": "user", "content": "x"}], "\\ud83d": 1}', "valid string"),
        (b'{"messages": [{"role": "user", "content": "x"}], "model": "\\ud83d"}', "no model"),
        (b"", "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_a_body_that_is_none_is_refused_in_openai_s_form(server, body, said):
    answer = httpx.post(f"{server[0]}/v1/chat/completions", content=body, headers=JSON_TYPE)
    assert answer.status_code in (400, 413)
    assert said in json.loads(answer.text)["error"]["message"]


def test_a_body_without_its_content_type_is_refused_with_the_header_to_send(server):
    body = json.dumps({"messages": QUESTION, "max_tokens": 2})
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):  # as curl -d sends it
        answer = httpx.post(f"{server[0]}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_an_unknown_page_is_refused_in_openai_s_form(server):
    assert httpx.get(f"{server[0]}/v1/embeddings").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{server[0]}/v1/completions").status_code == 405


NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 0.5, 1e-300, -1])
SURROGATES = st.text(st.characters(exclude_categories=()), max_size=6)
SCALARS = st.none() | st.booleans() | NUMBERS | SURROGATES
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SURROGATES, inner, max_size=3))
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer", "function"])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES, "content": SURROGATES | JSON},
    optional={"tool_calls": st.just([CALL]) | JSON, "name": JSON, "tool_call_id": JSON, "refusal": JSON},
)
FIELDS = sorted(ChatRequest.model_fields.keys() - {"messages", "max_tokens"})
REQUEST = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=3) | JSON},
    optional={name: JSON for name in FIELDS} | {"temperature": NUMBERS, "top_p": NUMBERS, "min_p": NUMBERS},
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(REQUEST | JSON)
def test_whatever_is_sent_is_answered_or_refused(server, body):
    limited = body | {"max_tokens": 2} if isinstance(body, dict) else body
    answer = post(server, limited)
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


@given(st.lists(SURROGATES, min_size=1, max_size=3))
def test_half_a_surrogate_pair_is_told_from_text(texts):
    tokenizer = byte_tokenizer()
    for text in texts:
        asked = {"messages": [{"role": "user", "content": text}]}
        try:
            (message,) = ChatRequest.model_validate(asked).messages
        except ValueError:
            assert any("\ud800" <= letter <= "\udfff" for letter in text)
        else:
            encode_prompt(tokenizer, [message.plain()])
