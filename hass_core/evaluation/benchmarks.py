"""The questions of an evaluation: the held-out prompts, the paper's benchmarks, or any file of the user's.

A benchmark is given as a name (heldout, mt_bench, humaneval, gsm8k), as a file, or as NAME=FILE. Files have any form
that `hass_core.data.conversations` knows, question files as EAGLE ships them among them. Given answers are ignored:
in a conversation of several turns, the history holds the target's own answers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hass_core.config import EvaluationConfig
from hass_core.data.conversations import Record, Unusable, as_prompt
from hass_core.data.holdout import assert_no_leak, heldout_prompts, normalized_hash, user_turns
from hass_core.data.prompts import read_prompts
from hass_core.data.sources import Skipped, read_file
from hass_core.data.templates import Message
from hass_core.errors import BadInput, StoreError
from hass_core.evaluation.benchmark_names import HELDOUT, ON_HUB, benchmark_file
from hass_core.store import Artifact, Store, origin_of, store_at


@dataclass(frozen=True)
class Question:
    """One conversation to be answered: it ends with a user turn, and an answer is due after every user turn."""

    benchmark: str
    id: str
    category: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class HubDataset:
    """Where a benchmark stands on the Hugging Face hub, and which column holds its questions."""

    path: str
    subset: str | None
    split: str
    column: str
    opening: str = ""  # text before each question


PLACES = (
    HubDataset("HuggingFaceH4/mt_bench_prompts", None, "train", "prompt"),
    HubDataset("openai/openai_humaneval", None, "test", "prompt", "Complete the code I provided.\n\n"),
    HubDataset("openai/gsm8k", "main", "test", "question"),
)
HUB: dict[str, HubDataset] = dict(zip(ON_HUB, PLACES, strict=True))


def load_benchmarks(config: EvaluationConfig) -> list[Question]:
    """All questions, at most `max_questions` of each benchmark, spread evenly over its categories' order.

    Raises BadInput naming the file and line of a broken question, or the benchmark that cannot be found.
    """
    questions: list[Question] = []
    for given in config.benchmarks:
        name, records = _open(given)
        asked = [_question(name, record) for record in records]
        if not asked:
            raise BadInput(f"the benchmark {given!r} holds no question; give a file with at least one")
        if any(q.benchmark == name for q in questions):
            raise BadInput(f"two benchmarks are named {name!r}; give one of them another name as NAME=FILE")
        questions += _evenly(asked, config.max_questions)
    return questions


def assert_unseen(questions: Iterable[Question], store: Store, draft: Artifact) -> bool:
    """Compare the questions with the prompts that `draft` was trained on, by normalised hash.

    Raises LeakedBenchmark naming the prompt. False when its training prompts are unknown: it came from outside, or the
    store was pruned.
    """
    prompts = training_prompts(store, draft)
    if prompts is None:
        return False
    hashes = frozenset(normalized_hash(m["content"]) for q in questions for m in q.messages if m["role"] == "user")
    assert_no_leak((text for record in prompts for text in user_turns(record)), hashes)
    return True


def assert_unseen_by_folder(questions: Iterable[Question], draft_dir: Path) -> bool:
    """As `assert_unseen`, for a draft's folder: what it was trained on is known where that lies in a store on disk, or
    is the copy of a draft of a store elsewhere that still answers.
    """
    address = origin_of(draft_dir, "draft")
    if address is None:
        return False
    try:
        store, draft = store_at(address, "draft")
        return assert_unseen(questions, store, draft)
    except StoreError:
        if "://" in address:  # away, or removed since the copy was made
            return False
        raise


def training_prompts(store: Store, draft: Artifact) -> list[Record] | None:
    """The prompts behind a draft, by way of each stage's recorded input; None when the store does not hold them."""
    artifact = draft
    for stage in ("features", "responses", "prompts"):
        manifest = store.open(artifact).manifest()
        digest = manifest.key.get(stage) if manifest else None
        found = store.artifact(stage, digest) if isinstance(digest, str) else None
        if found is None:  # the draft is from elsewhere, or the stage was pruned
            return None
        artifact = found
    return read_prompts(store, artifact)


def _open(given: str) -> tuple[str, list[Record]]:
    path = benchmark_file(given)
    if path is None:
        return given, heldout_prompts() if given == HELDOUT else list(_from_hub(given, HUB[given]))
    name, equals, _ = given.partition("=")
    return name if equals else path.name.split(".")[0], [_usable(item, path) for item in read_file(path)]


def _usable(item: Record | Skipped, path: Path) -> Record:
    if isinstance(item, Skipped):
        raise BadInput(f"{path}: the question {item.id} cannot be asked: {item.reason}; correct or remove it")
    return item


def _question(benchmark: str, record: Record) -> Question:
    try:
        messages = as_prompt(record).messages
    except Unusable as problem:
        raise BadInput(f"the question {record.id} cannot be asked: {problem}; correct or remove it") from None
    if record.tools:
        raise BadInput(f"the question {record.id} cannot be asked: it offers tools; remove the column tools")
    return Question(benchmark, record.id, record.category, messages)


def _evenly(questions: list[Question], limit: int | None) -> list[Question]:
    """`limit` questions at equal distances: a benchmark sorted by category keeps its mix."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i * len(questions) // limit] for i in range(limit)]


def _from_hub(name: str, dataset: HubDataset) -> Iterator[Record]:
    for number, row in enumerate(_rows(name, dataset)):
        content = row[dataset.column]
        turns = content if isinstance(content, list) else [content]
        messages = tuple({"role": "user", "content": dataset.opening + turn} for turn in turns)
        yield Record(f"{name}/{number}", str(row.get("category", name)), name, messages)


def _rows(name: str, dataset: HubDataset) -> Iterator[dict[str, Any]]:
    advice = f"give a local question file instead: --benchmarks {name}=FILE.jsonl"
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput(f"the benchmark {name} needs the package datasets (pip install datasets); or {advice}") from None
    try:
        yield from cast(Any, load_dataset(dataset.path, dataset.subset, split=dataset.split))
    except (OSError, ValueError) as error:  # not found, no connection, hub switched off
        raise BadInput(f"cannot load the benchmark {name} from {dataset.path}: {error}; {advice}") from error
