"""The prompts stage: what goes in comes out or is accounted for."""

import json

import pyarrow.parquet as pq
import pytest

from hass_core.config import RunConfig, parse_config
from hass_core.data import self_written
from hass_core.data.engines.local import LocalEngine
from hass_core.data.holdout import normalized_hash
from hass_core.data.prompts import collect_prompts, read_prompts
from hass_core.data.self_written import user_opening
from hass_core.data.templates import decode
from hass_core.errors import BadInput, TemplateError
from tests.data.families import SPECIAL, family_tokenizer

QUESTIONS = [
    "What is the tallest mountain in Europe, and who first climbed it?",
    "Write a limerick about a cat that learns to swim in winter.",
    "Explain photosynthesis to a ten-year-old in four sentences.",
]


def config(**prompts: object) -> RunConfig:
    return parse_config({"prompts": {"builtin": False, **prompts}})


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def skipped(artifact) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in pq.read_table(f"{artifact.url}/skipped.parquet").to_pylist()}


def test_files_become_prompts_with_their_origin(tmp_path, store, tiny_target):
    sharegpt = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "A."}]} for q in QUESTIONS]
    artifact = collect_prompts(config(files=(write(tmp_path / "chat.jsonl", sharegpt),)), store, tiny_target)
    rows = pq.read_table(f"{artifact.url}/prompts.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["chat/1", "chat/2", "chat/3"]
    assert rows[0]["messages"] == [{"role": "user", "content": QUESTIONS[0]}]
    assert rows[0]["sha256"] == normalized_hash(QUESTIONS[0])
    assert artifact.summary["prompts"] == artifact.summary["from_chat"] == 3
    assert artifact.summary["distinct_openings"] == 1.0


def test_every_prompt_left_out_has_its_reason(tmp_path, store, tiny_target):
    leaked = "What colour did the lighthouse keeper paint the door of the old boat house by the sea?"
    benchmark = write(tmp_path / "mine.jsonl", [{"question_id": 1, "turns": [leaked]}])
    rows = [
        {"id": "kept", "prompt": QUESTIONS[0]},
        {"id": "same", "prompt": QUESTIONS[0].upper()},
        {"id": "near", "prompt": QUESTIONS[0].replace("Europe", "Europa")},
        {"id": "leak", "prompt": leaked.lower()},
        {"id": "overlap", "prompt": f"Tell me: {leaked} I forgot."},
        {"id": "long", "prompt": "word " * 600},
        {"id": "marker", "prompt": "Ignore this <|im_end|> and go on"},
        {"messages": [{"role": "assistant", "content": "Hello"}]},
    ]
    run = parse_config(
        {
            "prompts": {"builtin": False, "files": [write(tmp_path / "rows.jsonl", rows)]},
            "evaluation": {"benchmarks": [f"mine={benchmark}"]},
        }
    )
    artifact = collect_prompts(run, store, tiny_target)
    assert skipped(artifact) == {
        "rows/same": "duplicate",
        "rows/near": "near-duplicate",
        "rows/leak": "is a held-out or benchmark question",
        "rows/overlap": "shares 13 words in a row with a held-out or benchmark question",
        "rows/long": "longer than prompts.max_prompt_tokens",
        "rows/marker": "contains a chat marker of the target",
        "rows/8": "no user turn",
    }
    assert [record.id for record in read_prompts(store, artifact)] == ["rows/kept"]
    assert artifact.summary["skipped"] == 7
    assert artifact.summary["skipped/near-duplicate"] == 1


def test_two_files_of_one_name_do_not_collide(tmp_path, store, tiny_target):
    files = []
    for i, question in enumerate(QUESTIONS[:2]):
        (tmp_path / str(i)).mkdir()
        files.append(write(tmp_path / str(i) / "chat.jsonl", [{"id": 1, "prompt": question}]))
    artifact = collect_prompts(config(files=files), store, tiny_target)
    assert [record.id for record in read_prompts(store, artifact)] == ["chat-1/1", "chat-2/1"]


def test_own_files_that_gave_nothing_are_told_with_the_reasons(tmp_path, store, tiny_target):
    """Beside the project's own prompts their loss would not be seen in any count."""
    write(tmp_path / "mine.jsonl", [{"prompt": "x" * 900}, {"prompt": "y" * 900}, {"messages": []}])
    write(tmp_path / "good.jsonl", [{"prompt": QUESTIONS[0]}])
    write(tmp_path / "empty.jsonl", [])
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in ("mine", "good", "empty"))
    summary = collect_prompts(config(files=files, builtin=True), store, tiny_target).summary
    assert (
        summary["unused"] == "empty (it holds none), mine (2 × longer than prompts.max_prompt_tokens, 1 × no user turn)"
    )
    summary = collect_prompts(config(files=files, builtin=True, max_prompts=5), store, tiny_target).summary
    before = "(prompts.max_prompts = 5 was reached before it was read)"
    assert summary["unused"] == f"empty {before}, good {before}, mine {before}"
    summary = collect_prompts(config(files=files[1:2]), store, tiny_target).summary
    assert "unused" not in summary


def test_a_broken_line_stops_before_the_target_writes_anything(tmp_path, store, tiny_target, monkeypatch):
    monkeypatch.setattr("hass_core.data.prompts.LocalEngine", None)  # any use of it would fail otherwise
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "One two three four?"}\n{"prompt": \n')
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 2, column 11: not valid JSON at the end of the line"):
        collect_prompts(config(files=(str(path),), self_written=10), store, tiny_target)


def test_a_missing_file_is_named(store, tiny_target):
    with pytest.raises(BadInput, match=r"nowhere\.jsonl: no such file; check prompts\.files"):
        collect_prompts(config(files=("nowhere.jsonl",)), store, tiny_target)


def test_no_prompt_at_all_is_an_error_that_lists_the_reasons(tmp_path, store, tiny_target):
    file = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "assistant", "content": "Hi"}]}])
    with pytest.raises(BadInput, match=r"no prompt is left: 1 × no user turn; add prompts\.files"):
        collect_prompts(config(files=(file,)), store, tiny_target)


def test_max_prompts_takes_the_first_ones(tmp_path, store, tiny_target):
    file = write(tmp_path / "rows.jsonl", [{"prompt": question} for question in QUESTIONS])
    artifact = collect_prompts(config(files=(file,), max_prompts=2), store, tiny_target)
    assert artifact.summary["prompts"] == 2


def test_a_changed_file_is_a_new_artifact_and_the_same_file_the_old_one(tmp_path, store, tiny_target):
    file = write(tmp_path / "rows.jsonl", [{"prompt": QUESTIONS[0]}])
    first = collect_prompts(config(files=(file,)), store, tiny_target)
    assert collect_prompts(config(files=(file,)), store, tiny_target) == first
    write(tmp_path / "rows.jsonl", [{"prompt": QUESTIONS[1]}])
    assert collect_prompts(config(files=(file,)), store, tiny_target).digest != first.digest


@pytest.fixture
def anything_goes(monkeypatch):
    """A random model writes no plausible request: count every text as one."""
    monkeypatch.setattr("hass_core.data.prompts.prompt_problem", lambda text: None if text else "too short")


@pytest.mark.usefixtures("anything_goes")
def test_the_target_writes_the_number_asked_for_and_an_interrupted_run_gives_the_same(store, tiny_target, tmp_path):
    run = config(self_written=24, max_prompt_tokens=60)
    artifact = collect_prompts(run, store, tiny_target)
    texts = [record.messages[0]["content"] for record in read_prompts(store, artifact)]
    assert len(set(texts)) == 24
    assert artifact.summary["from_self-written"] == 24

    class Stop(Exception):
        pass

    def stop(done: int, total: int, note: str) -> None:
        raise Stop

    other = type(store)(tmp_path / "other", cache=tmp_path / "cache")
    with pytest.raises(Stop):
        collect_prompts(run, other, tiny_target, stop)
    resumed = collect_prompts(run, other, tiny_target)
    assert [record.messages[0]["content"] for record in read_prompts(other, resumed)] == texts


def test_a_target_that_writes_nothing_usable_is_given_up(tmp_path, store, tiny_target, monkeypatch):
    monkeypatch.setattr("hass_core.data.prompts.prompt_problem", lambda text: "too short")
    file = write(tmp_path / "rows.jsonl", [{"prompt": QUESTIONS[0]}])
    artifact = collect_prompts(config(files=(file,), self_written=10, max_prompt_tokens=128), store, tiny_target)
    assert (artifact.summary["self_written"], artifact.summary["self_written_wanted"]) == (0, 10)


OPENINGS = {
    "llama-2": ("<s>[INST]", "[/INST]"),
    "llama-3": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("family", OPENINGS)
def test_the_opening_ends_where_the_users_text_begins(family):
    tokenizer = family_tokenizer(family)
    ids, closing = user_opening(tokenizer)
    assert (decode(tokenizer, ids), closing) == OPENINGS[family]


def test_a_template_that_changes_the_users_text_cannot_be_used_for_self_written_prompts():
    tokenizer = family_tokenizer.__wrapped__("smollm2")
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(TemplateError, match="does not show the user's text as it is; set self_written = 0"):
        user_opening(tokenizer)


def test_all_families_have_an_opening():
    assert all(user_opening(family_tokenizer(family))[0] for family in SPECIAL)


def test_rounds_of_texts_come_in_order_and_only_a_missing_one_is_sampled_again(tmp_path, tiny_target, monkeypatch):
    monkeypatch.setattr(self_written, "ROUND", 8)
    engine = LocalEngine(tiny_target, max_rows=4)

    def texts() -> list[list[str | None]]:
        return list(self_written.rounds_of_texts(engine, tiny_target.tokenizer, 20, 24, 3, tmp_path, first=1))

    once = texts()
    assert [len(texts) for texts in once] == [8, 8, 4]
    files = sorted(tmp_path.glob("*"))
    kept = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    assert texts() == once
    again = [file.stat().st_mtime_ns for file in files]
    assert [old == new for old, new in zip(kept, again, strict=True)] == [True, False, True]


def test_rounds_of_texts_go_on_when_another_process_has_finished_the_stage(tmp_path, tiny_target, monkeypatch):
    monkeypatch.setattr(self_written, "ROUND", 4)
    engine = LocalEngine(tiny_target, max_rows=4)
    rounds = self_written.rounds_of_texts(engine, tiny_target.tokenizer, 8, 24, 3, tmp_path / "gone", first=1)
    assert [len(texts) for texts in rounds] == [4, 4]
