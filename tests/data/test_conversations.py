"""Every form a conversation comes in, and what is refused or skipped."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hass_core.data.conversations import (
    BrokenRow,
    Record,
    Unusable,
    as_prompt,
    as_stored,
    from_stored,
    parse_row,
    user_text,
    with_placeholders,
)
from hass_core.data.messages import as_sent
from hass_core.data.sources import Skipped, read_dataset, read_file
from hass_core.errors import BadInput

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


def messages(*pairs: str) -> tuple[dict[str, str], ...]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple({"role": roles[pair[0]], "content": pair[1:]} for pair in pairs)


FORMS = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    "Alpaca": {"instruction": "Why?", "input": "", "output": "Because."},
    "content parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, ANSWER]},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_all_forms_give_the_same_record(row):
    assert parse_row({"id": 7, **row}, "file", 1) == Record("file/7", "general", "file", (QUESTION, ANSWER))


def test_a_question_file_keeps_category_and_all_turns():
    record = parse_row({"question_id": 81, "category": "writing", "turns": ["One?", "Two?"]}, "mt_bench", 1)
    assert (record.id, record.category) == ("mt_bench/81", "writing")
    assert [message["content"] for message in record.messages] == ["One?", "Two?"]


def test_an_alpaca_input_follows_its_instruction():
    record = parse_row({"instruction": "Add them.", "input": "1 and 2"}, "file", 3)
    assert record.messages == ({"role": "user", "content": "Add them.\n\n1 and 2"},)
    assert record.id == "file/3"


BROKEN = [
    ([1, 2], "expected an object with messages"),
    ({"text": "hello"}, "found text"),
    ({"conversations": "hello"}, "wrong type: conversations must be a list of messages, found str"),
    ({"messages": [{"role": ["user"], "content": "Hm"}]}, "wrong type: the role of a message must be text, found list"),
    ({"instruction": "Add.", "input": ["1", "2"]}, "wrong type: input must be text, found list"),
    ({"prompt": [3, QUESTION]}, "wrong type: a message must be an object, found int"),
    ({"prompt": "Hm?", "history": "no"}, "wrong type: history must be a list of turns, found str"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong type: the text of a message's part"),
    ({"messages": [{"role": "user", "content": 3}]}, "must be text, found int"),
    ({"messages": [7]}, "a message must be an object, found int"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_a_row_of_no_known_form_is_broken(row, message):
    with pytest.raises(BrokenRow, match=message):
        parse_row(row, "file", 1)


UNUSABLE = [
    ({"messages": [ANSWER]}, "no user turn"),
    ({"prompt": "  "}, "empty user turn"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not only text"),
    ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "a message without text"),
    ({"messages": [QUESTION, {"role": "wizard", "content": "Hm"}]}, "unknown role"),
    ({"prompt": "What is this?", "image": "cat.png"}, "the column image cannot be used"),
    ({"prompt": "Why?", "tools": "all of them"}, "the column tools cannot be read"),
    (
        {"system": "Be brief.", "messages": [{"role": "system", "content": "Be long."}, QUESTION]},
        "the column system .*",
    ),
    ({"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": 3}}]}]}, "tool call"),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "tide()"}]}, "tool call"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool call"),
    ({"prompt": "Half \ud83d a pair"}, "lone surrogate in the text"),
    ({"category": "\udc00", "prompt": "Why?"}, "lone surrogate in the text"),
    ({"request": {"model": "m", "input": ["embed me"]}}, "not a chat request"),
    ({"body": '{"model": "m"}', "method": "POST"}, "not a chat request"),
    ({"request": {"prompt": [1, 2, 3]}}, "a prompt of token ids"),
    ({"prompt": ["Why?", "How?"]}, "several prompts in one request"),
    ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "Hm"}]}]}, "not only text"),
]


@pytest.mark.parametrize(("row", "reason"), UNUSABLE)
def test_a_sound_row_without_use_is_skipped_with_a_reason(row, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        parse_row(row, "file", 1)


SYSTEM = {"role": "system", "content": "Be brief."}
READ_AS = {
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, QUESTION]}, (SYSTEM, QUESTION)),
    "upper case": ({"messages": [{"role": "System", "content": "Be brief."}, QUESTION]}, (SYSTEM, QUESTION)),
    "system column": ({"system": "Be brief.", "messages": [QUESTION]}, (SYSTEM, QUESTION)),
    "system said twice": ({"system": "Be brief.", "messages": [SYSTEM, QUESTION]}, (SYSTEM, QUESTION)),
    "system prompt of OpenOrca": ({"system_prompt": "Be brief.", "question": "Why?"}, (SYSTEM, QUESTION)),
    "history of pairs": (
        {"instruction": "Why?", "history": [["One?", "1"], ["Two?", None]]},
        (*messages("uOne?", "a1", "uTwo?"), QUESTION),
    ),
    "history as text": ({"prompt": "Why?", "history": '[{"role": "user", "content": "Why?"}]'}, (QUESTION, QUESTION)),
    "a list in a text": ({"conversations": '[{"from": "human", "value": "Why?"}]'}, (QUESTION,)),
    "prompt as messages": ({"prompt": [QUESTION], "completion": [ANSWER]}, (QUESTION,)),
    "a bare list": ([QUESTION, ANSWER], (QUESTION, ANSWER)),
    "a question that looks like a list": ({"prompt": '["Why?", "How?"]'}, messages('u["Why?", "How?"]')),
    "one prompt in a list": ({"prompt": ["Why?"]}, (QUESTION,)),
    "columns of a table that are null": (
        {"messages": [{"role": None, "from": "human", "content": None, "value": "Why?"}]},
        (QUESTION,),
    ),
    "thoughts as a part": (
        {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm"}, "So."]}]},
        (QUESTION, {"role": "assistant", "content": "So.", "reasoning_content": "Hm"}),
    ),
    "context": ({"question": "Why?", "context": "It rains."}, ({"role": "user", "content": "Why?\n\nIt rains."},)),
    "a gateway's log": ({"request": {"body": {"messages": [QUESTION]}}, "response": {"choices": []}}, (QUESTION,)),
    "a body in a text": ({"custom_id": "7", "body": json.dumps({"messages": [QUESTION]})}, (QUESTION,)),
}


@pytest.mark.parametrize(("row", "expected"), READ_AS.values(), ids=READ_AS)
def test_what_other_tools_write_is_read(row, expected):
    assert parse_row(row, "file", 1).messages == expected


def test_tools_and_calls_are_kept_as_templates_read_them():
    function = {"name": "tide", "parameters": {"type": "object"}}
    call = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Brest"}'}}
    turns = [
        {"role": "user", "content": "How high?"},
        {"role": "assistant", "content": None, "reasoning": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "4 m"},
    ]
    record = parse_row({"messages": turns, "tools": json.dumps([function])}, "file", 1)
    read = call | {"function": {"name": "tide", "arguments": {"port": "Brest"}}}
    assert record.tools == ({"type": "function", "function": function},)
    assert record.messages[1:] == (
        {"role": "assistant", "content": "", "tool_calls": [read], "reasoning_content": "I look."},
        {"role": "tool", "content": "4 m", "tool_call_id": "c1"},
    )
    stored = as_stored(record.messages, record.tools)
    assert from_stored(stored) == (list(record.messages), record.tools)
    assert as_sent(record.messages)[1]["tool_calls"] == [call]


def test_sharegpt_calls_become_calls():
    turns = [("human", "How high?"), ("function_call", '{"name": "tide", "arguments": {}}'), ("observation", "4 m")]
    record = parse_row({"conversations": [{"from": who, "value": text} for who, text in turns]}, "file", 1)
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool"]
    assert record.messages[1]["tool_calls"][0]["function"] == {"name": "tide", "arguments": {}}


@pytest.mark.parametrize("name", ["", "  ", None, {"a": 1}, True, float("nan"), "\udc00"])
def test_an_id_that_is_none_gives_way_to_the_number(name):
    assert parse_row({"id": name, "prompt": "Why?"}, "file", 5).id == "file/5"


def test_a_log_takes_its_id_from_the_outermost_part():
    assert parse_row({"request": {"id": "inner", "messages": [QUESTION]}, "id": "outer"}, "log", 5).id == "log/outer"
    assert parse_row({"request": {"id": "inner", "messages": [QUESTION]}}, "log", 5).id == "log/inner"


def test_an_answer_to_come_has_a_placeholder_but_not_the_last():
    roles = [m["role"] for m in with_placeholders(messages("s.", "u1", "u2", "acall", "tr", "tr", "u3"))]
    assert roles == ["system", "user", "assistant", "user", "assistant", "tool", "tool", "assistant", "user"]


CUTS = {
    "answers go": (("s.", "u1", "a1", "u2", "a2"), ("s.", "u1", "u2")),
    "a leading answer goes": (("a0", "u1", "a1"), ("u1",)),
    "a tool call stays with its result": (("u1", "acall", "tresult", "a1", "u2"), ("u1", "acall", "tresult", "u2")),
    "a closing system message goes": (("u1", "a1", "s."), ("u1",)),
}


@pytest.mark.parametrize(("given", "kept"), CUTS.values(), ids=CUTS)
def test_a_prompt_keeps_what_the_target_is_asked(given, kept):
    assert as_prompt(Record("id", "", "", messages(*given))).messages == messages(*kept)


def test_user_text_joins_the_users_turns():
    assert user_text(messages("s.", "u1", "a1", "u2")) == "1\n2"


ROWS = [{"id": i, "prompt": f"Question {i}?"} for i in range(3)]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_jsonl_gzip_json_list_and_parquet_read_alike(tmp_path):
    plain = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(ROWS, indent=1), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    expected = list(read_file(plain))
    assert [record.id for record in expected] == ["rows/0", "rows/1", "rows/2"]
    for name in ("rows.jsonl.gz", "rows.json", "rows.parquet"):
        assert list(read_file(tmp_path / name)) == expected, name


DOCUMENTS = {
    "blank lines first": "\n \n" + json.dumps(ROWS, indent=1),
    "byte order mark and CRLF": "\ufeff" + json.dumps(ROWS, indent=1).replace("\n", "\r\n"),
    "one line": json.dumps(ROWS),
    "wrapped": json.dumps({"version": 1, "data": ROWS}, indent=2),
    "object behind object": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "blank lines between": "\n\n".join(json.dumps(row) for row in ROWS) + "\n\n",
}


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_is_told_by_its_content(tmp_path, text, name):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert [record.id for record in read_file(tmp_path / name)] == ["rows/0", "rows/1", "rows/2"]


def test_a_list_of_lists_holds_conversations_and_a_list_of_messages_is_one(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([[QUESTION, ANSWER], [QUESTION]]))
    assert [len(record.messages) for record in read_file(tmp_path / "rows.json")] == [2, 1]
    (tmp_path / "rows.json").write_text(json.dumps([QUESTION, ANSWER]))
    assert [record.messages for record in read_file(tmp_path / "rows.json")] == [(QUESTION, ANSWER)]


@pytest.mark.parametrize("codec", ["zstd", "bz2", "gzip"])
def test_a_compressed_file_is_read_and_a_truncated_one_refused(tmp_path, codec):
    path = tmp_path / f"rows.jsonl.{ {'zstd': 'zst', 'bz2': 'bz2', 'gzip': 'gz'}[codec] }"
    with pa.CompressedOutputStream(str(path), codec) as file:
        for i in range(2000):
            file.write(json.dumps({"prompt": f"Question {i} of {i**7}?"}).encode() + b"\n")
    assert len(list(read_file(path))) == 2000
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(BadInput, match=r"rows\.jsonl\.\w+: cannot be read"):
        list(read_file(path))


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?"}\n' + "[" * 200_000 + "\n")
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 2: not valid JSON: nested too deep"):
        list(read_file(tmp_path / "rows.jsonl"))


def test_a_broken_line_is_named_by_file_and_number(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text() + '{"prompt": "broken\n')
    says = (
        r"""rows\.jsonl, line 4, column 12: not valid JSON at '"broken', behind '{"prompt": ': unterminated string; c"""
    )
    with pytest.raises(BadInput, match=says):
        list(read_file(path))


@pytest.mark.parametrize(
    ("line", "place", "at"),
    [
        ('{"prompt": "Why?" "id": 1}', "column 19", """at '"id": 1}', behind '{"prompt": "Why?" ': expecting ','"""),
        ('{"prompt": "Why?"', "column 18", 'at the end of the line, behind \'{"prompt": "Why?"\''),
        ("prompt", "column 1", "at 'prompt': expecting value"),
        (f'{{"prompt": "{"a" * 99}" x}}', "column 114", f"at 'x}}', behind '{'a' * 18}\" '"),
    ],
)
@pytest.mark.parametrize(("first", "end"), [("", "\n"), ("\ufeff", "\r\n")])
def test_a_broken_line_tells_the_column_and_what_stands_there(tmp_path, line, place, at, first, end):
    rows = (json.dumps(ROWS[0]), json.dumps(ROWS[0]), line, json.dumps(ROWS[0]))
    (tmp_path / "rows.jsonl").write_bytes((first + "".join(row + end for row in rows)).encode())
    with pytest.raises(BadInput) as told:
        list(read_file(tmp_path / "rows.jsonl"))
    assert f"rows.jsonl, line 3, {place}: not valid JSON {at}" in str(told.value)


def test_a_line_of_unknown_form_is_named_by_file_and_number(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"text": "x"}])
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 4: expected one of the keys .*, found text"):
        list(read_file(path))


def test_broken_json_list_names_its_line(tmp_path):
    (tmp_path / "rows.json").write_text('[{"prompt": "a"},\n {"prompt" "b"}]')
    with pytest.raises(
        BadInput, match=r"rows\.json, line 2, column 12: not valid JSON at '\"b\"}]', behind ' {\"prompt\" '"
    ):
        list(read_file(tmp_path / "rows.json"))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{}\n", "line 1"),
        ('\n\n{"prompt": "Why?"\n}\n{}', "line 5"),
        ('[{"prompt": "Why?"},\n {}]', "record 2"),
        ('{"data": [{"prompt": "Why?"},\n {}]}', "record 2"),
    ],
)
def test_a_broken_row_of_a_whole_text_is_named_by_where_it_begins_or_by_its_place_in_a_list(tmp_path, text, place):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(BadInput, match=rf"rows\.jsonl, {place}: expected one of the keys"):
        list(read_file(tmp_path / "rows.jsonl"))


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "ok"}\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(
        BadInput, match=r"""line 2, column 13: not valid UTF-8 behind '{"prompt": "'; save the file as UTF-8"""
    ):
        list(read_file(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet"])
def test_a_truncated_file_is_refused(tmp_path, name):
    whole = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), whole)
    else:
        whole.write_bytes(gzip.compress(b'{"prompt": "Why?"}\n' * 1000))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(BadInput, match=rf"{name}: (cannot be read|not a readable Parquet file)"):
        list(read_file(whole))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"none\.jsonl: no such file; check prompts\.files"):
        list(read_file(tmp_path / "none.jsonl"))


def test_the_number_of_a_skipped_row_takes_no_id_from_another(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"id": 1, "messages": [ANSWER]}, ROWS[2], ROWS[1]])
    assert [item.reason if isinstance(item, Skipped) else item.id for item in read_file(path)] == [
        "rows/0",
        "no user turn",
        "rows/2",
        "rows/1",
    ]


BAD_TABLES = {
    "no UTF-8": (
        pa.table({"prompt": pa.array([b"\xff\xfe"]).view(pa.string())}),
        "not a readable Parquet file: 'utf-8' codec",
    ),
    "no day": (
        pa.table({"prompt": ["Why?"], "at": pa.array([10**13], pa.timestamp("s"))}),
        "not a readable Parquet file: date value out of range",
    ),
    "two columns of one name": (
        pa.table([["Why?"], ["How?"]], names=["prompt", "prompt"]),
        "two columns are called prompt; rename one of them",
    ),
}


@pytest.mark.parametrize(("table", "said"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_that_python_cannot_hold_is_refused(tmp_path, table, said):
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(BadInput, match=rf"rows\.parquet: {said}"):
        list(read_file(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.arrow", "rows.csv.gz"])
def test_a_file_of_another_format_is_told_by_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"prompt\nWhy?\n")
    with pytest.raises(BadInput, match=r"files are not read; convert it to JSON lines \(\.jsonl\) or Parquet"):
        list(read_file(tmp_path / name))


def test_skipped_rows_and_repeated_ids_are_reported_not_fatal(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"messages": [ANSWER]}, ROWS[0], ROWS[1]])
    assert [item.reason if isinstance(item, Skipped) else item.id for item in read_file(path)] == [
        "rows/0",
        "no user turn",
        "id used twice",
        "rows/1",
    ]


def test_a_dataset_folder_is_streamed(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    records = list(read_dataset(str(tmp_path)))
    assert [record.messages[0]["content"] for record in records] == [row["prompt"] for row in ROWS]
    assert records[0].source == tmp_path.name


def test_a_dataset_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"cannot open the dataset .*missing:test"):
        list(read_dataset(f"{tmp_path}/missing:test"))
