"""The prompts shipped with the package: complete, distinct, and the held-out ones kept apart from training."""

import hashlib
from collections import Counter

import pytest

from hass_core.data.conversations import Record
from hass_core.data.holdout import HELDOUT_FILE, TRAINING_FILE, packaged_prompts, user_turns

CATEGORIES = {
    *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
    *("code_completion", "arithmetic"),
}
SHARED_WORDS = 8


@pytest.fixture(scope="module")
def train() -> list[Record]:
    return packaged_prompts(TRAINING_FILE)


@pytest.fixture(scope="module")
def heldout() -> list[Record]:
    return packaged_prompts(HELDOUT_FILE)


def normalised(text: str) -> str:
    """Lower case, single blanks."""
    return " ".join(text.casefold().split())


def hashes(records: list[Record]) -> list[str]:
    """SHA-256 of every normalised user turn."""
    return [hashlib.sha256(normalised(turn).encode()).hexdigest() for r in records for turn in user_turns(r)]


def word_sequences(records: list[Record]) -> set[tuple[str, ...]]:
    """Every eight words in a row of every user turn."""
    turns = [normalised(turn).split() for record in records for turn in user_turns(record)]
    return {tuple(w[i : i + SHARED_WORDS]) for w in turns for i in range(len(w) - SHARED_WORDS + 1)}


def test_there_are_enough_training_prompts_of_every_category(train):
    per_category = Counter(record.category for record in train)
    assert set(per_category) == CATEGORIES
    assert len(train) >= 240
    assert min(per_category.values()) >= 24


def test_there_are_eight_heldout_prompts_of_every_category(heldout):
    assert Counter(record.category for record in heldout) == dict.fromkeys(CATEGORIES, 8)


def test_every_id_is_unique(train, heldout):
    ids = [record.id for record in train + heldout]
    assert len(set(ids)) == len(ids)


def test_no_user_turn_occurs_twice(train, heldout):
    turns = hashes(train + heldout)
    assert len(set(turns)) == len(turns)


def test_no_heldout_turn_is_a_training_turn(train, heldout):
    assert set(hashes(train)).isdisjoint(hashes(heldout))


def test_training_and_heldout_prompts_share_no_eight_words_in_a_row(train, heldout):
    assert word_sequences(train) & word_sequences(heldout) == set()


def test_every_prompt_ends_in_a_user_turn_that_is_not_blank(train, heldout):
    for record in train + heldout:
        assert record.messages[-1]["role"] == "user", record.id
        assert all(turn.strip() for turn in user_turns(record)), record.id


def test_both_files_hold_prompts_of_several_turns(train, heldout):
    for records in (train, heldout):
        several = {record.category for record in records if len(user_turns(record)) > 1}
        assert len(several) >= 8
