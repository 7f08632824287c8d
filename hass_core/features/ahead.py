"""Tokenise the parts of the responses ahead of the target's passes.

Tokenising is Python's work, and so is launching the target's kernels: in one process they would wait for each other.
Where there is much to do and the machine has cores to spare, other processes tokenise; else a thread does.
"""

import os
import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hass_core.config import FeaturesConfig
from hass_core.features.tokenised import Part, encode_part
from hass_core.features.tokenising_process import TokenisingProcess

MANY_CONVERSATIONS = 8192  # below, one thread is done before it matters
CORES_PER_PROCESS, MOST_PROCESSES = 4, 4

PartsOf = Callable[[list[str], Callable[[str], Path]], Iterator[Part]]
"""The named parts in order, each ready by the time it is asked for; the function gives a part's file."""


@contextmanager
def tokenising(tokenizer: PreTrainedTokenizerBase, settings: FeaturesConfig, conversations: int) -> Iterator[PartsOf]:
    """What tokenises so many conversations. Entered early, its processes are up when they are needed."""
    count = min(MOST_PROCESSES, (os.cpu_count() or 1) // CORES_PER_PROCESS)
    if conversations < MANY_CONVERSATIONS or not isinstance(tokenizer, PreTrainedTokenizerFast):
        count = 0
    here = partial(encode_part, tokenizer=tokenizer, settings=settings)
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        if count:
            tokenizer.save_pretrained(folder)
        processes = [stack.enter_context(TokenisingProcess(folder, settings)) for _ in range(count)]
        encode = partial(_encode_elsewhere, _queue_of(processes), here) if processes else here
        threads = stack.enter_context(ThreadPoolExecutor(max(1, count)))
        yield partial(_ahead, threads, encode, 1 + count)


def _encode_elsewhere(
    idle: "queue.SimpleQueue[TokenisingProcess]", here: Callable[[str, Path], Part], name: str, path: Path
) -> Part:
    """By an idle process. What it can't do is done here, where an error belongs."""
    process = idle.get()
    try:
        part = process.encode(name, path) if process.alive else None
    finally:
        idle.put(process)
    return part or here(name, path)


def _ahead(
    threads: ThreadPoolExecutor,
    encode: Callable[[str, Path], Part],
    count: int,
    names: list[str],
    fetch: Callable[[str], Path],
) -> Iterator[Part]:
    """The parts, `count` of them submitted beyond the one that is waited for."""

    def submit(name: str) -> Future[Part]:
        return threads.submit(lambda: encode(name, fetch(name)))

    coming = iter(names)
    waiting = deque(submit(name) for name in islice(coming, count))
    try:
        while waiting:
            part = waiting.popleft().result()
            waiting.extend(submit(name) for name in islice(coming, 1))
            yield part
    finally:
        for future in waiting:
            future.cancel()


def _queue_of(processes: list[TokenisingProcess]) -> "queue.SimpleQueue[TokenisingProcess]":
    idle: queue.SimpleQueue[TokenisingProcess] = queue.SimpleQueue()
    for process in processes:
        idle.put(process)
    return idle
