"""Tokenise the parts of the responses ahead of the target's passes: token ids and masks, what the target reads.

Tokenising is Python's work, and so is launching the target's kernels: in one process they would wait for each other.
Where there is much to do and the machine has cores to spare, other processes tokenise; else, and until they are up, a
thread does. Nothing here loads torch, so that those processes are up soon.
"""

import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from hass_core.config import FeaturesConfig
from hass_core.data.conversations import from_stored
from hass_core.data.processes import spare_processes, tokenizer_processes
from hass_core.data.templates import SkippedConversation, encode_conversation

MANY_CONVERSATIONS = 8192  # below, one thread is done before it matters
LOOK_AGAIN_SECONDS = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """One conversation of L tokens, ready for the target."""

    id: str
    split: str
    token_ids: np.ndarray  # [L] int32
    loss_mask: np.ndarray  # [L] uint8


@dataclass(frozen=True)
class Part:
    """One part of the responses, tokenised."""

    name: str
    conversations: list[Encoded]
    skipped: list[tuple[str, str]]  # id and reason

    @property
    def tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.conversations)

    @property
    def supervised_tokens(self) -> int:
        return sum(int(c.loss_mask.sum()) for c in self.conversations)


def encode_part(
    name: str, path: Path, tokenizer: PreTrainedTokenizerBase, settings: FeaturesConfig, limit: int | None = None
) -> Part:
    """Token ids and masks of the first `limit` conversations of a part."""
    part = Part(name, [], [])
    for row in pq.read_table(path).slice(0, limit).to_pylist():
        try:
            messages, tools = from_stored(row)
            found = encode_conversation(tokenizer, messages, row["answer_token_ids"], tools)
        except SkippedConversation as problem:
            part.skipped.append((row["id"], problem.reason))
            continue
        ids, mask = (x[: settings.max_tokens_per_conversation] for x in (found.token_ids, found.loss_mask))
        if not any(mask):
            part.skipped.append((row["id"], "no answer within max_tokens_per_conversation"))
        else:
            split = split_of(row["id"], settings.validation_fraction)
            part.conversations.append(Encoded(row["id"], split, np.array(ids, np.int32), np.array(mask, np.uint8)))
    return part


def split_of(name: str, validation_fraction: float) -> str:
    """`validation` for that fraction of the ids, the same on every run."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") / 2**64
    return "validation" if position < validation_fraction else "train"


PartsOf = Callable[[list[str], Callable[[str], Path]], Iterator[Part]]
"""The named parts in order, begun at once, each ready by the time it is asked for; the function gives a part's file."""


@contextmanager
def tokenising(tokenizer: PreTrainedTokenizerBase, settings: FeaturesConfig, conversations: int) -> Iterator[PartsOf]:
    """What tokenises so many conversations. Entered early, its processes are up when they are needed."""
    count = spare_processes(tokenizer) if conversations >= MANY_CONVERSATIONS else 0
    encode: Callable[[str, Path], Part] = partial(encode_part, tokenizer=tokenizer, settings=settings)
    with ExitStack() as stack:
        if count:
            processes = stack.enter_context(tokenizer_processes(count, tokenizer, _begin, settings))
            encode = _Elsewhere(processes, encode)
        threads = ThreadPoolExecutor(max(1, count))
        stack.callback(threads.shutdown, cancel_futures=True)
        yield partial(_ahead, threads, encode, 1 + count)


class _Elsewhere:
    """Tokenises parts by processes. Until they are up, and what they can't do, is done here, one part at a time."""

    def __init__(self, processes: ProcessPoolExecutor, here: Callable[[str, Path], Part]):
        self._processes, self._here, self._one = processes, here, threading.Lock()
        self._first_task = processes.submit(os.getpid)

    def up(self) -> bool:
        """Whether a process would begin a part at once. Starting takes a second or, on a busy machine, several."""
        return self._first_task.done()

    def __call__(self, name: str, path: Path) -> Part:
        while not self.up():
            if self._one.acquire(timeout=LOOK_AGAIN_SECONDS):
                try:
                    return self._here(name, path)
                finally:
                    self._one.release()
        try:
            return self._processes.submit(_encode, name, path).result()
        except Exception as error:  # a process that died, or a part that cannot be read: met again here
            log.warning("a process could not tokenise %s, a thread does: %s", name, error)
        with self._one:
            return self._here(name, path)


_encode_here: Callable[[str, Path], Part]  # in a process that tokenises


def _begin(tokenizer: PreTrainedTokenizerBase, settings: FeaturesConfig) -> None:
    global _encode_here
    _encode_here = partial(encode_part, tokenizer=tokenizer, settings=settings)


def _encode(name: str, path: Path) -> Part:
    return _encode_here(name, path)


def _ahead(
    threads: ThreadPoolExecutor,
    encode: Callable[[str, Path], Part],
    count: int,
    names: list[str],
    fetch: Callable[[str], Path],
) -> Iterator[Part]:
    """The parts, `count` of them submitted now, and always so many beyond the one that is waited for."""

    def submit(name: str) -> Future[Part]:
        return threads.submit(lambda: encode(name, fetch(name)))

    coming = iter(names)
    waiting = deque(submit(name) for name in islice(coming, count))

    def parts() -> Iterator[Part]:
        while waiting:
            part = waiting.popleft().result()
            waiting.extend(submit(name) for name in islice(coming, 1))
            yield part

    return parts()
