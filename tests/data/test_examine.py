"""Prompts examined by other processes: the selection is that of a single one, and an error comes in its place."""

import os
import random
from collections.abc import Iterator

import pytest

from hass_core.config import PromptsConfig
from hass_core.data import examine
from hass_core.data.conversations import Record
from hass_core.data.examine import Candidate, Examination
from hass_core.data.holdout import Forbidden
from hass_core.data.selection import Selection
from hass_core.data.sources import Skipped
from hass_core.errors import BadInput

LEAKED = "What colour did the lighthouse keeper paint the door of the old boat house by the sea?"
WORDS = [*"rsl", "garden", "music", "winter", "bridge", "paper", "silver", "engine", "letter", "window", "forest"]


def candidates() -> Iterator[Candidate]:
    """Prompts of all fates: kept, equal, similar, leaked, too long, marked, of one id, or none at all."""
    rng, texts = random.Random(0), list[str]()
    for i in range(400):
        fresh = " ".join(rng.choices(WORDS, k=rng.randint(8, 30))) + f" {i}?"
        text = rng.choice(
            [fresh, fresh, rng.choice(texts or [fresh]), rng.choice(texts or [fresh]) + " please", LEAKED]
        )
        text = rng.choice([text] * 8 + ["word " * 700, f"{text} <|im_end|>"])
        texts.append(text)
        if i % 40 == 7:
            yield Skipped(f"s{i}", "file", "not valid JSON")
        role = "assistant" if i % 50 == 9 else "user"
        yield Record(f"c{i - i % 60 // 59}", "c", "file", ({"role": role, "content": text},))


def selected(tokenizer, given: Iterator[Candidate], **settings: object) -> tuple[Selection, list[bool]]:
    config, forbidden = PromptsConfig.model_validate(settings), Forbidden([LEAKED])
    selection = Selection(config, tokenizer, forbidden)
    with Examination(tokenizer, config, forbidden) as examination:
        told = []
        for candidate, examined in examination.of(given):
            if selection.full:
                break
            told.append(examined[1] is not None)
            selection.consider(candidate, examined)
    return selection, told


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(examine, "MANY", 50)
    monkeypatch.setattr(examine, "CHUNK", 20)
    monkeypatch.setattr(examine, "spare_processes", lambda tokenizer: 2)


def test_the_selection_is_that_of_one_process(tiny_target, two_processes, monkeypatch):
    found, elsewhere = selected(tiny_target.tokenizer, candidates())
    monkeypatch.setattr(examine, "spare_processes", lambda tokenizer: 0)
    expected, here = selected(tiny_target.tokenizer, candidates())
    assert any(elsewhere)
    assert not any(here)
    assert (found.kept, found.skipped, found.seen) == (expected.kept, expected.skipped, expected.seen)
    reasons = ("duplicate", "near-duplicate", "id used twice", "contains a chat marker of the target", "not valid JSON")
    assert all(found.reasons()[reason] for reason in (*reasons, "longer than prompts.max_prompt_tokens"))


def test_an_error_of_the_source_comes_behind_what_is_before_it(tiny_target, two_processes, monkeypatch):
    def broken() -> Iterator[Candidate]:
        yield from (
            Record(f"c{i}", "c", "file", ({"role": "user", "content": f"{i} {WORDS[i % 13]}?"},)) for i in range(70)
        )
        raise BadInput("line 71")

    for count in (2, 0):
        monkeypatch.setattr(examine, "spare_processes", lambda tokenizer, count=count: count)
        with pytest.raises(BadInput, match="line 71"):
            selected(tiny_target.tokenizer, broken())
        full, _ = selected(tiny_target.tokenizer, broken(), max_prompts=5)
        assert len(full.kept) == 5


def test_what_a_dying_process_leaves_is_examined_here(tiny_target, two_processes, monkeypatch, caplog):
    monkeypatch.setattr(examine, "_examine", die)
    found, elsewhere = selected(tiny_target.tokenizer, candidates())
    assert not any(elsewhere)
    assert found.seen == 410
    assert "could not examine prompts" in caplog.text


def die(chunk: list[Candidate]) -> None:
    os._exit(1)
