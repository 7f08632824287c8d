"""Tokenise the parts of the responses ahead of the target's passes.

Tokenising is Python's work, and so is launching the target's kernels: in one process they would wait for each other.
Where there is much to do and the machine has cores to spare, other processes tokenise; else, and until they are up, a
thread does.
"""

import os
import queue
import threading
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
CORES_FOR_OTHERS, CORES_PER_PROCESS, MOST_PROCESSES = 2, 2, 8
LOOK_AGAIN_SECONDS = 0.05

PartsOf = Callable[[list[str], Callable[[str], Path]], Iterator[Part]]
"""The named parts in order, begun at once, each ready by the time it is asked for; the function gives a part's file."""


@contextmanager
def tokenising(tokenizer: PreTrainedTokenizerBase, settings: FeaturesConfig, conversations: int) -> Iterator[PartsOf]:
    """What tokenises so many conversations. Entered early, its processes are up when they are needed."""
    count = min(MOST_PROCESSES, ((os.cpu_count() or 1) - CORES_FOR_OTHERS) // CORES_PER_PROCESS)
    if conversations < MANY_CONVERSATIONS or not isinstance(tokenizer, PreTrainedTokenizerFast):
        count = 0
    here = partial(encode_part, tokenizer=tokenizer, settings=settings)
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        if count:
            tokenizer.save_pretrained(folder)
        processes = [stack.enter_context(TokenisingProcess(folder, settings)) for _ in range(count)]
        encode = _Elsewhere(processes, here) if processes else here
        threads = ThreadPoolExecutor(max(1, count))
        stack.callback(threads.shutdown, cancel_futures=True)
        yield partial(_ahead, threads, encode, 1 + count)


class _Elsewhere:
    """Tokenises parts by processes; called by as many threads. What they can't do is done here, one part at a time."""

    def __init__(self, processes: list[TokenisingProcess], here: Callable[[str, Path], Part]):
        self._here, self._one = here, threading.Lock()
        self._idle: queue.SimpleQueue[TokenisingProcess] = queue.SimpleQueue()
        for process in processes:
            self._idle.put(process)

    def __call__(self, name: str, path: Path) -> Part:
        process = self._idle.get()
        try:
            while not process.ready():
                if self._one.acquire(timeout=LOOK_AGAIN_SECONDS):
                    try:
                        return self._here(name, path)
                    finally:
                        self._one.release()
            part = process.encode(name, path) if process.alive else None
        finally:
            self._idle.put(process)
        if part is not None:
            return part
        with self._one:
            return self._here(name, path)


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
