"""Feeding the loop: the micro-batches of each optimizer step, read in the background.

An optimizer step takes `packs_per_step` consecutive packs of the stream, so what it trains on does not depend on how
they are divided: 8 micro-batches of 1 pack equal 1 of 8, on 1 process or on many.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from typing import Generic, Protocol, TypeVar

import torch

from hass_core.errors import BadInput
from hass_core.training.batch import Batch, Conversation, collate, rounded_up
from hass_core.training.packing import WINDOW_BLOCKS, PackStream

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
    """How the `packs_per_step` packs of an optimizer step are divided: first among processes, then by each into
    micro-batches of at most `packs_per_micro_batch`, whose gradients accumulate. What the step computes stays the same.

    Raises BadInput where the processes' shares would differ.
    """

    packs_per_step: int
    packs_per_micro_batch: int | None = None  # None = as many as there are
    processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        if self.packs_per_step % self.processes:
            raise BadInput(
                f"training.packs_per_step = {self.packs_per_step} cannot be divided evenly among {self.processes} "
                "processes; choose a multiple of their number, or launch fewer"
            )

    @property
    def micro_batch(self) -> int:
        """Packs of a micro-batch; the last one of a step may have fewer."""
        share = self.packs_per_step // self.processes
        return min(share, self.packs_per_micro_batch or share)

    def own(self, packs: list[list[int]]) -> list["Group"]:
        """This process's micro-batches of a step."""
        share = self.packs_per_step // self.processes
        first, end = self.process * share, (self.process + 1) * share
        starts = range(first, end, self.micro_batch)
        return [Group(start, packs[start : min(end, start + self.micro_batch)]) for start in starts]


@dataclass(frozen=True)
class Group:
    """The conversations of a micro-batch, by packs; `first` is the first pack's number within the optimizer step."""

    first: int
    packs: list[list[int]]

    @property
    def conversations(self) -> list[int]:
        return list(chain.from_iterable(self.packs))


@dataclass(frozen=True)
class Feed:
    """How a group becomes a micro-batch: pinned for a GPU, its shape rounded up for a CUDA graph."""

    dataset: Dataset
    align_steps: int
    pin: bool = False
    round_to_tokens: int | None = None  # tokens that a micro-batch has, about

    def __call__(self, group: Group) -> Batch:
        conversations = self.dataset.many(group.conversations)
        left = iter(conversations)
        rows = tuple(sum(len(c.token_ids) for c in islice(left, len(pack))) for pack in group.packs)
        batch = replace(collate(conversations, self.align_steps), pack_rows=rows, first_pack=group.first)
        if self.round_to_tokens:
            batch = rounded_up(batch, self.round_to_tokens)
        return batch.pin_memory() if self.pin else batch


def micro_batches(
    feed: Feed, stream: PackStream, division: Division, start_step: int
) -> Iterator[Callable[[], list[Batch]]]:
    """For each optimizer step from `start_step` on, what makes this process's micro-batches."""
    packs = stream.passes(start_step * division.packs_per_step)
    steps = (division.own(list(islice(packs, division.packs_per_step))) for _ in count())
    ahead = int(windows_ahead(feed.dataset.groups_in_memory) * stream.window)
    for step in read_ahead(steps, feed.dataset, ahead):
        yield partial(list, map(feed, step))


def windows_ahead(groups_in_memory: int) -> float:
    """How much to read before it is trained on. The window that is trained on has to stay in memory as well; and a
    window's row groups are wanted all at once, so with less than a window they must come faster than they are used."""
    return min(2.0, max(0.75, groups_in_memory / WINDOW_BLOCKS - 1.25))


def read_ahead(steps: Iterator[list[Group]], dataset: Dataset, conversations: int) -> Iterator[list[Group]]:
    """The steps, each asked of the dataset by a thread while so many conversations before it are trained on.

    A window's row groups are wanted all at once, when its first pack is; this spreads their reading.
    """
    ahead: deque[list[Group]] = deque()
    waiting, readers = 0, ThreadPoolExecutor(READERS, "read-ahead")
    try:
        for step in steps:
            wanted = [i for group in step for i in group.conversations]
            readers.submit(dataset.warm, wanted)
            ahead.append(step)
            waiting += len(wanted)
            while waiting > conversations:
                waiting -= sum(len(group.conversations) for group in ahead[0])
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
