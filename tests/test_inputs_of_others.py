"""Inputs that other tools write, from the command line's stages to what lies in the store: right, or one sentence."""

import json
from collections import Counter
from contextlib import ExitStack
from itertools import count

import pyarrow.parquet as pq
import pytest

from hass_core.config import parse_config
from hass_core.data.prompts import collect_prompts
from hass_core.data.responses import generate_responses
from hass_core.data.templates import encode_conversation, supervised_runs
from hass_core.errors import HassError
from hass_core.target_model.loader import Target, freeze
from tests.conftest import SPECIAL, byte_tokenizer, tiny_llama
from tests.loopback import replying

SAFFRON, BREAD = "What gives saffron its colour?", "How long does rye bread keep?"
ANSWERED = [{"from": "human", "value": SAFFRON}, {"from": "gpt", "value": "Crocin."}]
OTHER = [{"from": "human", "value": BREAD}, {"from": "bing", "value": "A week."}]
USER = {"role": "user", "content": SAFFRON}
TOOLS = [{"type": "function", "function": {"name": "weigh", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weigh", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "2 g"}

FILES = {  # rows of a file → the first message of each prompt's roles and texts, and what is skipped
    "an unknown role": ([{"conversations": ANSWERED}, {"conversations": OTHER}], [[("user", SAFFRON)]], "unknown role"),
    "upper case": ([{"conversations": [{"from": "HUMAN", "value": SAFFRON}]}], [[("user", SAFFRON)]], None),
    "a developer": (
        [{"messages": [{"role": "developer", "content": "Be brief."}, USER]}],
        [[("system", "Be brief."), ("user", SAFFRON)]],
        None,
    ),
    "a system column": (
        [{"system": "Be brief.", "conversations": ANSWERED}],
        [[("system", "Be brief."), ("user", SAFFRON)]],
        None,
    ),
    "a history column": (
        [{"instruction": SAFFRON, "input": "", "output": "Crocin.", "history": [[BREAD, "A week."]]}],
        [[("user", BREAD), ("user", SAFFRON)]],
        None,
    ),
    "a tools column": (
        [{"prompt": BREAD}, {"tools": json.dumps(TOOLS), "prompt": SAFFRON}],
        [[("user", BREAD)]],
        "the template has no place for the column tools",
    ),
    "tool calls": (
        [
            {"prompt": BREAD},
            {"messages": [USER, CALL, RESULT]},
            {"messages": [USER, CALL | {"content": "So."}, RESULT]},
        ],
        [[("user", BREAD)]],
        "tool call",
    ),
    "half a pair": (
        [{"prompt": BREAD}, {"prompt": "What is \ud83d?"}],
        [[("user", BREAD)]],
        "lone surrogate in the text",
    ),
    "half a pair as id": ([{"id": "\udc00", "prompt": BREAD}], [[("user", BREAD)]], None),
    "a list in a text": ([{"conversations": json.dumps(ANSWERED)}], [[("user", SAFFRON)]], None),
    "messages as prompt": ([{"prompt": [USER], "completion": [RESULT]}], [[("user", SAFFRON)]], None),
    "question and answer": ([{"question": BREAD, "answer": "A week."}], [[("user", BREAD)]], None),
}


def stored(artifact, name: str) -> list[dict]:
    return pq.read_table(f"{artifact.url}/{name}").to_pylist()


def asked(store, target: Target, file, **responses):
    """The prompts stage of one file, and its settings."""
    config = parse_config(
        {"prompts": {"builtin": False, "files": [str(file)]}, "responses": {"max_new_tokens": 24, **responses}}
    )
    return collect_prompts(config, store, target), config


@pytest.mark.parametrize(("rows", "prompts", "reason"), FILES.values(), ids=FILES)
def test_rows_of_other_tools(tmp_path, store, tiny_target, rows, prompts, reason):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    artifact, _ = asked(store, tiny_target, tmp_path / "rows.jsonl")
    found = [[(m["role"], m["content"]) for m in row["messages"]] for row in stored(artifact, "prompts.parquet")]
    assert found == prompts
    assert {row["reason"] for row in stored(artifact, "skipped.parquet")} == ({reason} if reason else set())
    assert len(found) + len(stored(artifact, "skipped.parquet")) == len(rows)


TEXTS = {
    "blank lines first": "\n\n" + json.dumps([{"conversations": ANSWERED}], indent=1),
    "byte order mark": "\ufeff" + json.dumps([{"conversations": ANSWERED}], indent=1).replace("\n", "\r\n"),
    "list of lists": json.dumps([ANSWERED], indent=1),
    "wrapped": json.dumps({"data": [{"conversations": ANSWERED}]}, indent=1),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_files_of_other_tools(tmp_path, store, tiny_target, text):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8", newline="")
    (row,) = stored(asked(store, tiny_target, tmp_path / "rows.json")[0], "prompts.parquet")
    assert row["messages"] == [USER]


def test_a_file_without_any_known_role_is_refused(tmp_path, store, tiny_target):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": OTHER}))
    with pytest.raises(HassError, match=r"^no prompt is left: 1 × unknown role; add prompts\.files"):
        asked(store, tiny_target, tmp_path / "rows.jsonl")


SOUND = {"choices": [{"message": {"role": "assistant", "content": "A plain answer."}, "finish_reason": "stop"}]}
ODD = {
    "<html><body>The gateway is warming up</body></html>": "'The gateway is warming up'",
    json.dumps({"choices": []}): "choices",
    json.dumps({"error": {"message": "the provider failed", "code": 502}}): "'the provider failed'",
    json.dumps({"choices": [{"index": 0, "finish_reason": "content_filter"}]}): "content_filter",
}


@pytest.fixture
def served(monkeypatch):
    """Start a server whose answer to request number i is `reply(i)`; gives its address."""
    monkeypatch.setattr("hass_core.data.engines.openai.FIRST_PAUSE_SECONDS", 0.01)
    with ExitStack() as servers:

        def start(reply) -> str:
            numbers = count(1)
            models = json.dumps({"data": [{"id": "model"}]})
            return servers.enter_context(replying(models, lambda: reply(next(numbers)))) + "/v1"

        yield start


@pytest.fixture
def twenty(tmp_path):
    words = ["rivers", "stars", "violins", "glass", "chess", "honey", "trains", "ink", "sleep", "tides"]
    rows = [{"prompt": f"{verb} {word}, if you please."} for word in words for verb in ("Draw", "Explain to a child")]
    (tmp_path / "twenty.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "twenty.jsonl"


def answered(store, target, file, url: str):
    prompts, config = asked(store, target, file, engine="openai", server_url=url)
    return generate_responses(config, prompts, store, target)


@pytest.mark.parametrize("odd", ODD)
def test_one_odd_reply_costs_no_conversation(store, tiny_target, twenty, served, odd):
    artifact = answered(store, tiny_target, twenty, served(lambda i: odd if i == 3 else json.dumps(SOUND)))
    assert (artifact.summary["conversations"], artifact.summary["skipped"]) == (20, 0)


@pytest.mark.parametrize("odd", ODD)
def test_a_server_of_odd_replies_alone_is_refused_soon_and_quoted(store, tiny_target, twenty, served, odd, tmp_path):
    with pytest.raises(HassError, match=r"^no prompt was answered: 8 × the server's reply .*\(it said: ") as refused:
        answered(store, tiny_target, twenty, served(lambda i: odd))
    assert ODD[odd] in str(refused.value)
    assert not list((tmp_path / "store" / "responses").rglob("*.parquet"))
    assert not list((tmp_path / "store" / "responses").rglob("manifest.json"))


def message(**fields) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", **fields}, "finish_reason": "stop"}]})


def test_content_that_is_null_is_an_empty_answer(store, tiny_target, twenty, served):
    with pytest.raises(HassError, match=r"^no prompt was answered: 20 × empty answer"):
        answered(store, tiny_target, twenty, served(lambda i: message(content=None)))


def with_template(template: str, more: tuple[str, ...] = (), ends: tuple[int, ...] = (2,)) -> Target:
    """A random target with this chat template and these special tokens beside the usual ones."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, *more]})
    tokenizer.chat_template = template
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=list(ends))
    model.generation_config.eos_token_id = list(ends)
    return freeze(model, tokenizer, name="made")


THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_goes_where_the_template_has_a_place_for_it_or_is_a_reason_to_skip(
    store, tiny_target, twenty, served
):
    url = served(lambda i: message(content="A plain answer.", reasoning_content="I weigh it."))
    target = with_template(THINK)
    artifact = answered(store, target, twenty, url)
    rows = stored(artifact, "part-00000.parquet")
    said = {target.tokenizer.decode(ids) for row in rows for ids in row["answer_token_ids"]}
    assert said == {"<think>I weigh it.</think>A plain answer.<|im_end|>"}
    assert len(rows) == 20
    with pytest.raises(HassError, match=r"20 × the template has no place for the answer's reasoning"):
        answered(store, tiny_target, twenty, url)


NEXT_ROLE_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_where_the_next_role_ends_a_turn_all_answers_end_with_its_token_or_the_template_is_explained(
    store, twenty, served
):
    target = with_template(NEXT_ROLE_ENDS, ("<|user|>", "<|assistant|>", "<|system|>"), ends=(0, 259))
    user = target.tokenizer.convert_tokens_to_ids("<|user|>")
    rows = stored(answered(store, target, twenty, served(lambda i: json.dumps(SOUND))), "part-00000.parquet")
    encoded = [encode_conversation(target.tokenizer, row["messages"], row["answer_token_ids"]) for row in rows]
    assert len(rows) == 20
    assert all(run[-1] == user for found in encoded for run in supervised_runs(found))
    prompts, config = asked(store, target, twenty, max_new_tokens=64)  # the random target itself
    kept = stored(generate_responses(config, prompts, store, target), "part-00000.parquet")
    assert 0 < len(kept) < 20
    assert all(ids[-1] == user for row in kept for ids in row["answer_token_ids"])
    prompts, config = asked(store, target, twenty, max_new_tokens=1)
    with pytest.raises(HassError, match=r"an answer ends with <\|user\|>, which opens the next one") as refused:
        generate_responses(config, prompts, store, target)
    assert "add the end token" not in str(refused.value)


TURNS = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the roles must take turns') }}{% endif %}{% if m.role == 'user' %}<|im_start|>{{ first }}"
    "[{{ m.content }}]{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def test_a_template_that_wants_turns_gets_them(store, tmp_path):
    target = with_template(TURNS)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"turns": [SAFFRON, BREAD]}))
    prompts, config = asked(store, target, tmp_path / "rows.jsonl")
    (row,) = stored(generate_responses(config, prompts, store, target), "part-00000.parquet")
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "user", "assistant"]
    shipped = collect_prompts(parse_config({}), store, target)
    reasons = Counter(row["reason"] for row in stored(shipped, "skipped.parquet"))
    assert not any("turns" in reason for reason in reasons)
    assert shipped.summary["prompts"] > 590
