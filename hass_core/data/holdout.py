"""Questions that training must never see: the project's held-out prompts and every benchmark question.

A training prompt leaks when one of its user turns equals a forbidden question after normalisation (SHA-256 over
lower-case words, so punctuation and spacing do not hide it) or shares 13 words in a row with one, the overlap test
that the GPT-3 paper (arXiv 2005.14165, appendix C) uses.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path

from hass_core.config import EvaluationConfig
from hass_core.data.conversations import Record
from hass_core.data.sources import Skipped, read_file
from hass_core.errors import LeakedBenchmark

OVERLAP_WORDS = 13
TRAINING_FILE = "prompts_train.jsonl"
HELDOUT_FILE = "prompts_heldout.jsonl"


class Forbidden:
    """Hashes and word sequences of questions kept from training."""

    def __init__(self, questions: Iterable[str]):
        self._questions = list(questions)

    @cached_property
    def hashes(self) -> frozenset[str]:
        """Normalised SHA-256 of every question."""
        return frozenset(normalized_hash(question) for question in self._questions)

    @cached_property
    def sequences(self) -> frozenset[str]:
        """Every 13 words in a row of every question."""
        return frozenset(sequence for question in self._questions for sequence in _sequences(question))

    def leak(self, text: str) -> str | None:
        """Why `text` may not be trained on, or None."""
        if normalized_hash(text) in self.hashes:
            return "is a held-out or benchmark question"
        if not self.sequences.isdisjoint(_sequences(text)):
            return f"shares {OVERLAP_WORDS} words in a row with a held-out or benchmark question"
        return None


def packaged_prompts(name: str, source: str | None = None) -> list[Record]:
    """The records of one prompt file shipped with the package."""
    with resources.as_file(resources.files("hass_core.data") / name) as path:
        records = list(read_file(path, source))
    assert not any(isinstance(record, Skipped) for record in records), name
    return [record for record in records if isinstance(record, Record)]


def heldout_prompts() -> list[Record]:
    """The project's own test prompts, never trained on."""
    return packaged_prompts(HELDOUT_FILE)


def forbidden_questions(evaluation: EvaluationConfig) -> Forbidden:
    """All questions shipped for tests and benchmarks, and those of the user's own benchmark files."""
    folder = resources.files("hass_core.data")
    shipped = [f.name for f in folder.iterdir() if f.name.endswith(".jsonl") and f.name != TRAINING_FILE]
    records = [record for name in sorted(shipped) for record in packaged_prompts(name)]
    for benchmark in evaluation.benchmarks:
        path = Path(benchmark.partition("=")[2] or benchmark)
        if path.suffix:  # a file, not the name of a shipped benchmark
            records += [record for record in read_file(path) if isinstance(record, Record)]
    return Forbidden(text for record in records for text in user_turns(record))


def user_turns(record: Record) -> list[str]:
    """The texts of the user's turns."""
    return [message["content"] for message in record.messages if message["role"] == "user"]


def normalized_hash(text: str) -> str:
    """SHA-256 over the text's words: case, punctuation, spacing and Unicode form do not matter."""
    return hashlib.sha256(" ".join(_words(text)).encode()).hexdigest()


def assert_no_leak(prompts: Iterable[str], forbidden_hashes: frozenset[str]) -> None:
    """Raise LeakedBenchmark when a training prompt is a forbidden question."""
    for prompt in prompts:
        if normalized_hash(prompt) in forbidden_hashes:
            raise LeakedBenchmark(
                f"the training prompt {prompt[:80]!r} is a held-out or benchmark question; remove it from the source "
                "files, or the evaluation would measure memory"
            )


@lru_cache(maxsize=8)  # a text is hashed, then compared with the questions
def _words(text: str) -> list[str]:
    """The words by which texts are compared."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())


def _sequences(text: str) -> Iterator[str]:
    words = _words(text)
    return (" ".join(words[i : i + OVERLAP_WORDS]) for i in range(len(words) - OVERLAP_WORDS + 1))
