"""Feeding the loop: the micro-batches of each optimizer step, read in the background.

An optimizer step takes `processes × accumulation_steps × packs_per_batch` consecutive packs of the stream, so what it
trains on does not depend on how they are divided: 8 micro-batches of 1 pack equal 1 of 8, on 1 process or on many.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Generic, Protocol, TypeVar

import torch

from hass_core.training.batch import Batch, Conversation, collate
from hass_core.training.packing import WINDOW_BLOCKS, PackStream
from hass_core.training.padding import padded

T = TypeVar("T")
READERS = 4


class Dataset(Protocol):
    """Random access to conversations."""

    def many(self, indices: Sequence[int]) -> Sequence[Conversation]: ...

    @property
    def groups_in_memory(self) -> int:
        """Row groups that are kept in memory."""
        ...

    def warm(self, indices: Sequence[int]) -> None:
        """Have in memory what these conversations need."""
        ...


@dataclass(frozen=True)
class Division:
    """How an optimizer step's packs are divided."""

    packs_per_batch: int
    accumulation_steps: int = 1
    processes: int = 1
    process: int = 0

    @property
    def packs_per_step(self) -> int:
        return self.packs_per_batch * self.accumulation_steps * self.processes

    def mine(self, packs: list[list[int]]) -> list[list[int]]:
        """The conversations of each of this process's micro-batches."""
        per_process = self.packs_per_batch * self.accumulation_steps
        own = packs[self.process * per_process : (self.process + 1) * per_process]
        batches = [own[i : i + self.packs_per_batch] for i in range(0, len(own), self.packs_per_batch)]
        return [[index for pack in batch for index in pack] for batch in batches]


@dataclass(frozen=True)
class Feed:
    """How a group of conversations becomes a micro-batch: pinned for a GPU, its shape rounded up for a graph."""

    dataset: Dataset
    align_steps: int
    pin: bool = False
    round_to: int | None = None

    def __call__(self, group: Sequence[int]) -> Batch:
        batch = collate(self.dataset.many(group), self.align_steps)
        if self.round_to:
            batch = padded(batch, self.round_to)
        return batch.pin_memory() if self.pin else batch


def micro_batches(
    feed: Feed, stream: PackStream, division: Division, start_step: int
) -> Iterator[Callable[[], list[Batch]]]:
    """For each optimizer step from `start_step` on, what makes this process's micro-batches."""
    packs = stream.passes(start_step * division.packs_per_step)
    steps = (division.mine(list(islice(packs, division.packs_per_step))) for _ in count())
    ahead = int(windows_ahead(feed.dataset.groups_in_memory) * stream.window)
    for step in read_ahead(steps, feed.dataset, ahead):
        yield partial(list, map(feed, step))


def windows_ahead(groups_in_memory: int) -> float:
    """How much to read before it is trained on. The window that is trained on has to stay in memory as well; and a
    window's row groups are wanted all at once, so with less than a window they must come faster than they are used."""
    return min(2.0, max(0.75, groups_in_memory / WINDOW_BLOCKS - 1.25))


def read_ahead(steps: Iterator[list[list[int]]], dataset: Dataset, conversations: int) -> Iterator[list[list[int]]]:
    """The steps, each asked of the dataset by a thread while so many conversations before it are trained on.

    A window's row groups are wanted all at once, when its first pack is; this spreads their reading.
    """
    ahead: deque[list[list[int]]] = deque()
    waiting, readers = 0, ThreadPoolExecutor(READERS, "read-ahead")
    try:
        for step in steps:
            readers.submit(dataset.warm, list(chain.from_iterable(step)))
            ahead.append(step)
            waiting += sum(map(len, step))
            while waiting > conversations:
                waiting -= sum(map(len, ahead[0]))
                yield ahead.popleft()
        yield from ahead
    finally:
        readers.shutdown(cancel_futures=True)


class Prefetcher(Generic[T]):
    """Runs jobs in threads, `ahead` of them before they are asked for: by default one more than there are threads.

    Results come in order; an error is raised where its result was due. The jobs, too, are made in a thread: whoever
    asks for results has a GPU waiting, and packing a window takes a hundredth of a second.
    """

    def __init__(self, jobs: Iterator[Callable[[], T]], threads: int = 1, ahead: int | None = None):
        self._jobs = jobs
        # several threads that each divide a sum among all cores would wait for each other
        alone = partial(torch.set_num_threads, 1) if threads > 1 else None
        self._planner, self._threads = ThreadPoolExecutor(1, "plan"), ThreadPoolExecutor(threads, "feed", alone)
        self._pending: deque[Future[T]] = deque()
        for _ in range(ahead or threads + 1):
            self._begin()

    def __next__(self) -> T:
        self._begin()
        return self._pending.popleft().result()

    def _begin(self) -> None:
        job = self._planner.submit(next, self._jobs)
        self._pending.append(self._threads.submit(lambda: job.result()()))

    def close(self) -> None:
        """End the threads, and the jobs."""
        self._planner.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)
        if isinstance(self._jobs, Generator):
            self._jobs.close()


def noisy(batch: Batch, half_width: float, seed: int) -> torch.Tensor:
    """The batch's features plus uniform noise; the same noise for the same seed."""
    generator = torch.Generator(batch.features.device).manual_seed(seed)
    noise = torch.empty(batch.features.shape, device=batch.features.device)
    return batch.features + noise.uniform_(-half_width, half_width, generator=generator)
