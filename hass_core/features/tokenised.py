"""Parts of the responses, tokenised and masked ahead of the target's passes.

Tokenising is Python's work, and so is launching the target's kernels: in one process they would wait for each other.
Where there is much to do and the machine has cores to spare, other processes tokenise; else, and until they are up, a
thread does.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hass_core.config import FeaturesConfig
from hass_core.data.templates import SkippedConversation, encode_conversation

MANY_CONVERSATIONS = 8192  # below, starting processes takes longer than what they save
CORES_PER_PROCESS, MOST_PROCESSES = 4, 4


@dataclass(frozen=True)
class Encoded:
    """One conversation, ready for the target."""

    id: str
    split: str
    token_ids: list[int]
    loss_mask: list[int]


@dataclass(frozen=True)
class Part:
    """One part of the responses, tokenised."""

    name: str
    conversations: list[Encoded]
    skipped: list[list[str]]  # id and reason

    @property
    def tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.conversations)


def parts_ahead(
    names: list[str],
    fetch: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerBase,
    settings: FeaturesConfig,
    conversations: int,
) -> Iterator[Part]:
    """The named parts in order, each ready by the time it is asked for; `conversations` are in all of them.

    `fetch` gives a part's file.
    """
    processes = min(MOST_PROCESSES, (os.cpu_count() or 1) // CORES_PER_PROCESS)
    many = conversations >= MANY_CONVERSATIONS and processes > 0 and isinstance(tokenizer, PreTrainedTokenizerFast)
    with ThreadPoolExecutor(1) as thread, _started(processes, tokenizer) if many else nullcontext() as started:

        def submit(name: str) -> Future[Part]:
            if started and started.ready():
                return started.pool.submit(_encode, name, fetch(name), settings)
            return thread.submit(lambda: encode_part(name, fetch(name), tokenizer, settings))

        yield from _ahead(names, 1 + processes if many else 1, submit)


class _Started(NamedTuple):
    pool: ProcessPoolExecutor
    up: list[Future[int]]

    def ready(self) -> bool:
        """Whether all processes are up, which takes seconds; never where one could not start."""
        return all(future.done() and future.exception() is None for future in self.up)


@contextmanager
def _started(processes: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Started]:
    # not forked: a copy of a process that uses a GPU or threads may hang
    spawn = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # handed over by name: a pipe would hold up whoever fills it
        with ProcessPoolExecutor(processes, spawn, initializer=_begin, initargs=(folder,)) as pool:
            yield _Started(pool, [pool.submit(int) for _ in range(processes)])


def _ahead(names: list[str], count: int, submit: Callable[[str], Future[Part]]) -> Iterator[Part]:
    """The parts, `count` of them submitted beyond the one that is waited for."""
    coming = iter(names)
    waiting = deque(submit(name) for name in islice(coming, count))
    while waiting:
        part = waiting.popleft().result()
        waiting.extend(submit(name) for name in islice(coming, 1))
        yield part


def encode_part(
    name: str, path: Path, tokenizer: PreTrainedTokenizerBase, settings: FeaturesConfig, limit: int | None = None
) -> Part:
    """Token ids and masks of the first `limit` conversations of a part."""
    part = Part(name, [], [])
    for row in pq.read_table(path).slice(0, limit).to_pylist():
        try:
            found = encode_conversation(tokenizer, row["messages"], row["answer_token_ids"])
        except SkippedConversation as problem:
            part.skipped.append([row["id"], problem.reason])
            continue
        ids, mask = (x[: settings.max_tokens_per_conversation] for x in (found.token_ids, found.loss_mask))
        if not any(mask):
            part.skipped.append([row["id"], "no answer within max_tokens_per_conversation"])
        else:
            part.conversations.append(Encoded(row["id"], split_of(row["id"], settings.validation_fraction), ids, mask))
    return part


def split_of(name: str, validation_fraction: float) -> str:
    """`validation` for that fraction of the ids, the same on every run."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") / 2**64
    return "validation" if position < validation_fraction else "train"


_tokenizer: PreTrainedTokenizerBase | None = None  # of a process that does nothing but tokenise


def _begin(folder: str) -> None:
    global _tokenizer
    # by its file as it is: a model's own class may build the cutting anew
    _tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    parent = multiprocessing.parent_process()
    if parent is not None:  # a parent that was killed closes nothing, and its pool would wait for ever
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode(name: str, path: Path, settings: FeaturesConfig) -> Part:
    assert _tokenizer is not None
    return encode_part(name, path, _tokenizer, settings)
