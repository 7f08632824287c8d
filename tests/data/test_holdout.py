"""Held-out questions cannot reach the training data."""

import json

import pytest

from hass_core.config import EvaluationConfig
from hass_core.data.holdout import Forbidden, assert_no_leak, forbidden_questions, heldout_prompts, normalized_hash
from hass_core.errors import LeakedBenchmark

QUESTION = "Write a short story about a lighthouse keeper who finds a message in a bottle one morning."


@pytest.mark.parametrize("text", [QUESTION.upper(), QUESTION.replace(" ", "\n "), QUESTION.rstrip(".")])
def test_the_hash_ignores_case_spacing_and_punctuation(text):
    assert normalized_hash(text) == normalized_hash(QUESTION)


def test_the_hash_tells_other_words_apart():
    assert normalized_hash("one two") != normalized_hash("onetwo")


def test_a_question_and_thirteen_of_its_words_are_forbidden():
    forbidden = Forbidden([QUESTION])
    thirteen = " ".join(QUESTION.split()[:13])
    twelve = " ".join(QUESTION.split()[:12])
    assert forbidden.leak(QUESTION.lower()) == "is a held-out or benchmark question"
    assert forbidden.leak(f"Please: {thirteen}, thank you") == (
        "shares 13 words in a row with a held-out or benchmark question"
    )
    assert forbidden.leak(f"Please: {twelve}, thank you") is None


def test_a_leak_stops_the_run_and_quotes_the_prompt():
    with pytest.raises(LeakedBenchmark, match=r"'Write a short story about .* remove it from the source files"):
        assert_no_leak(["Fine.", QUESTION], Forbidden([QUESTION.lower()]).hashes)


def test_the_shipped_heldout_prompts_are_forbidden():
    forbidden = forbidden_questions(EvaluationConfig())
    for record in heldout_prompts():
        assert forbidden.leak(record.messages[0]["content"])


def test_a_benchmark_file_of_the_users_is_forbidden(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question_id": 1, "turns": [QUESTION, "And then?"]}) + "\n")
    forbidden = forbidden_questions(EvaluationConfig(benchmarks=(f"mine={path}",)))
    assert forbidden.leak(QUESTION)
    assert forbidden.leak("and then")
