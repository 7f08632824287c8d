"""Questions come in as they stand, and what cannot be asked is named."""

import json

import pytest

from hass_core.config import EvaluationConfig
from hass_core.errors import BadInput
from hass_core.evaluation.benchmarks import load_benchmarks


def benchmarks(*names, **settings):
    return load_benchmarks(EvaluationConfig(benchmarks=names, **settings))


def test_a_question_file_in_eagle_form_keeps_turns_and_categories(questions_file):
    questions = benchmarks(f"mt={questions_file}")
    assert [q.benchmark for q in questions] == ["mt"] * 3
    assert [m["content"] for m in questions[0].messages] == ["Tell me about tides.", "Now shorter."]
    assert questions[1].category == "math"


def test_a_file_without_a_name_is_named_after_itself(questions_file):
    assert benchmarks(str(questions_file))[0].benchmark == "mine"


def test_answers_in_the_file_are_not_used(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    assert [m["content"] for m in benchmarks(str(path))[0].messages] == ["Hi", "Bye"]


def test_a_limit_takes_questions_from_the_whole_file(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": f"question {i}"}) + "\n" for i in range(80)))
    ids = [q.id for q in benchmarks(str(path), max_questions=8)]
    assert ids == [f"many/{i}" for i in range(0, 80, 10)]


def test_a_broken_line_is_named_with_its_number(questions_file):
    with questions_file.open("a") as file:
        file.write('{"turns": ["unfinished\n')
    with pytest.raises(BadInput, match=r"mine\.jsonl, line 4, column \d+: not valid JSON"):
        benchmarks(f"mine={questions_file}")


def test_a_question_without_text_is_named(questions_file):
    with questions_file.open("a") as file:
        file.write('{"question_id": 9, "turns": [" "]}\n')
    with pytest.raises(BadInput, match="question mine/4 cannot be asked: empty user turn"):
        benchmarks(f"mine={questions_file}")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(BadInput, match="holds no question"):
        benchmarks(str(tmp_path / "none.jsonl"))


def test_an_unknown_benchmark_is_told_what_there_is():
    with pytest.raises(BadInput, match=r"no benchmark 'mtbench'.*mt_bench, humaneval, gsm8k; give a file or NAME=FILE"):
        benchmarks("mtbench")


def test_two_benchmarks_of_one_name_are_refused(questions_file):
    with pytest.raises(BadInput, match="two benchmarks are named 'mine'"):
        benchmarks(f"mine={questions_file}", f"mine={questions_file}")


def test_a_hub_benchmark_without_a_hub_points_to_local_files(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(BadInput, match=r"cannot load the benchmark gsm8k.*gsm8k=FILE\.jsonl"):
        benchmarks("gsm8k")
