"""Whatever JSON a row holds, it is a conversation, skipped with a reason, or refused: never a traceback."""

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hass_core.config import PromptsConfig
from hass_core.data.conversations import FORM_KEYS, WRAPPERS, Record, as_stored, from_stored, parse_row
from hass_core.data.engines.replies import OddReply, models_in, quoted, read_reply, without_refused
from hass_core.data.holdout import Forbidden
from hass_core.data.messages import ROLES, BrokenRow, Unusable, as_sent
from hass_core.data.selection import Selection
from hass_core.data.sources import Skipped, read_file
from hass_core.errors import BadInput
from tests.data.families import family_tokenizer

TEXT = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from([*ROLES, "[1]", '{"name": "f"}'])
KEYS = st.sampled_from(
    [
        *FORM_KEYS,
        *WRAPPERS,
        *("role", "from", "content", "value", "id", "category", "system", "history", "tools", "tool_calls", "function"),
        *("name", "arguments", "function_call", "type", "text", "output", "context", "reasoning", "images", "choices"),
        *("message", "finish_reason", "token_ids", "error", "detail"),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=5),
    max_leaves=20,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(list(ROLES)) | JSON, "content": TEXT | JSON},
    optional={"tool_calls": JSON, "name": JSON, "reasoning_content": JSON, "tool_call_id": JSON},
)
ROW = JSON | st.fixed_dictionaries(
    {"messages": st.lists(TURN, max_size=4)}, optional={"id": JSON, "tools": JSON, "system": JSON, "history": JSON}
)


@given(ROW)
def test_any_row_is_a_record_or_has_its_reason(row):
    with suppress(BrokenRow, Unusable):
        check_record(parse_row(row, "file", 1))


def check_record(record: Record) -> None:
    """It can be stored, read back and sent."""
    stored = as_stored(record.messages, record.tools)
    json.dumps([record.id, record.category, stored], ensure_ascii=False).encode()
    assert from_stored(json.loads(json.dumps(stored))) == (list(record.messages), record.tools)
    json.dumps(as_sent(record.messages))


@pytest.mark.parametrize("family", ["qwen3", "llama-2", "smollm2"])
@settings(max_examples=30)
@given(st.lists(TURN, min_size=1, max_size=4), JSON)
def test_any_conversation_is_kept_or_skipped_by_every_template(family, turns, tools):
    selection = Selection(PromptsConfig(), family_tokenizer(family), Forbidden([]))
    try:
        record = parse_row({"messages": turns, "tools": tools}, "file", 1)
    except (BrokenRow, Unusable):
        return
    selection.consider(record)
    assert len(selection.kept) + len(selection.skipped) == 1


@settings(max_examples=40)
@given(st.lists(ROW, max_size=3), st.sampled_from(["lines", "list", "object", "indented"]))
def test_any_file_is_read_or_refused(tmp_path_factory, rows, form):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    whole = {"list": rows, "object": {"data": rows}, "indented": rows}.get(form)
    lines = "\n".join(json.dumps(row) for row in rows)
    path.write_text(lines if form == "lines" else json.dumps(whole, indent=1 if form == "indented" else None))
    with suppress(BadInput):
        assert all(isinstance(item, (Record, Skipped)) for item in read_file(path))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "rows.jsonl"
    path.write_bytes(data)
    with suppress(BadInput):
        list(read_file(path))


CHOICE = st.fixed_dictionaries({}, optional={"message": TURN | JSON, "finish_reason": JSON, "token_ids": JSON})
REPLY = JSON | st.fixed_dictionaries({"choices": st.lists(CHOICE | JSON, max_size=2)}, optional={"error": JSON})


@given(REPLY.map(lambda reply: json.dumps(reply).encode()) | st.binary(max_size=60))
def test_any_reply_is_an_answer_or_odd(data):
    quoted(data).encode()
    models_in(data)
    without_refused({"max_tokens": 1, "seed": 0}, quoted(data))
    with suppress(OddReply):
        reply = read_reply(data)
        (reply.content + reply.reasoning).encode()
