"""Every form a conversation comes in, and what is refused or skipped."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hass_core.data.conversations import BrokenRow, Record, Unusable, as_prompt, parse_row, user_text
from hass_core.data.sources import Skipped, read_dataset, read_file
from hass_core.errors import BadInput

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
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
    ({"messages": [{"role": "wizard", "content": "Hm"}]}, "unknown role 'wizard'; known are system, user"),
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
]


@pytest.mark.parametrize(("row", "reason"), UNUSABLE)
def test_a_sound_row_without_use_is_skipped_with_a_reason(row, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        parse_row(row, "file", 1)


def messages(*pairs: str) -> tuple[dict[str, str], ...]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple({"role": roles[pair[0]], "content": pair[1:]} for pair in pairs)


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


def test_a_broken_line_is_named_by_file_and_number(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text() + '{"prompt": "broken\n')
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 4: not valid JSON: .*; correct the line"):
        list(read_file(path))


def test_a_line_of_unknown_form_is_named_by_file_and_number(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"text": "x"}])
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 4: expected one of the keys .*, found text"):
        list(read_file(path))


def test_broken_json_list_names_its_line(tmp_path):
    (tmp_path / "rows.json").write_text('[{"prompt": "a"},\n {"prompt" "b"}]')
    with pytest.raises(BadInput, match=r"rows\.json, line 2: not valid JSON"):
        list(read_file(tmp_path / "rows.json"))


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "ok"}\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(BadInput, match=r"line 2: not valid UTF-8; save the file as UTF-8"):
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
