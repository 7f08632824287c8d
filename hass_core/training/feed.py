"""Feeding the loop: which conversations train together, and the micro-batches of each optimizer step.

**Packs** have about `tokens_per_pack` tokens and are drawn anew for each pass. The order is a pure function of the
lengths, the row groups, the seed and the pass, so training resumes anywhere by counting packs: there is no state to
save. Each pass holds every conversation exactly once. A row group is read whole. So a pass goes through windows of a
few row groups drawn at random, and everything of a window is shuffled: whatever the data's size, what is read is used
before it is forgotten.

**Micro-batches** are read in the background. An optimizer step takes `packs_per_step` consecutive packs of the stream,
so what it trains on does not depend on how they are divided: 8 micro-batches of 1 pack equal 1 of 8, on 1 process or on
many.
"""

import bisect
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from hass_core.errors import BadInput
from hass_core.training.batch import Batch, Conversation, collate, rounded_up

T = TypeVar("T")
READERS = 4
BLOCK = 64  # conversations taken as a row group where nobody says what those are
SAMPLED = 8  # conversations of a row group that a sample takes
WINDOW_BLOCKS = 16  # row groups, of 64 MB, that are shuffled together
WINDOW = 4096  # conversations at most, or packing them takes long


def packs_of_pass(
    lengths: Sequence[int] | np.ndarray,
    tokens_per_pack: int,
    seed: int,
    number: int,
    blocks: Sequence[int] | np.ndarray | None = None,
) -> list[list[int]]:
    """All conversations, as packs in random order. A conversation longer than a pack gets one to itself.

    `blocks`: the first conversation of each row group, ascending.
    """
    return list(_packs_by_window(np.asarray(lengths), tokens_per_pack, seed, number, blocks))


def _packs_by_window(
    lengths: np.ndarray, tokens_per_pack: int, seed: int, number: int, blocks: Sequence[int] | np.ndarray | None
) -> Iterator[list[int]]:
    """As `packs_of_pass`, each window packed when it is reached: a whole pass would hold a training step up."""
    generator = np.random.default_rng((seed, number))
    parts = divided(len(lengths), blocks)
    drawn = [parts[i] for i in generator.permutation(len(parts))]
    for window in _windows(drawn):
        shuffled = generator.permutation(window)
        filled = best_fit(shuffled, lengths[shuffled], tokens_per_pack)
        yield from (filled[i] for i in generator.permutation(len(filled)))


def _windows(blocks: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Blocks after one another, so many at a time that they can be shuffled together."""
    window: list[np.ndarray] = []
    for block in blocks:
        full = len(window) == WINDOW_BLOCKS or sum(map(len, window)) + len(block) > WINDOW
        if window and full:
            yield np.concatenate(window)
            window = []
        window.append(block)
    if window:
        yield np.concatenate(window)


def divided(count: int, blocks: Sequence[int] | np.ndarray | None = None) -> list[np.ndarray]:
    """Conversations 0 to `count` by row group."""
    if blocks is None:
        return np.array_split(np.arange(count), max(1, count // BLOCK))
    return np.split(np.arange(count), np.asarray(blocks)[1:])


def sample_order(count: int, seed: int, blocks: Sequence[int] | np.ndarray | None = None) -> list[int]:
    """All of `count` conversations, so that the first ones are a random sample read from few row groups."""
    generator = np.random.default_rng(seed)
    parts = [generator.permutation(part) for part in divided(count, blocks)]
    shuffled = [parts[i] for i in generator.permutation(len(parts))]
    first, rest = ([i for part in shuffled for i in part[own]] for own in (slice(SAMPLED), slice(SAMPLED, None)))
    return [int(i) for i in first + rest]


def best_fit(indices: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, longest first, goes into the fullest pack it fits in."""
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for i in np.argsort(-lengths, kind="stable"):
        fitting = bisect.bisect_left(free, (int(lengths[i]), -1))
        room, pack = free.pop(fitting) if fitting < len(free) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(int(indices[i]))
        if room > lengths[i]:
            bisect.insort(free, (room - int(lengths[i]), pack))
    return packs


class PackStream:
    """The endless sequence of packs of all passes, readable from any of them on."""

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        tokens_per_pack: int,
        seed: int,
        blocks: Sequence[int] | np.ndarray | None = None,
    ):
        self.lengths, self.tokens_per_pack, self.seed, self.blocks = np.asarray(lengths), tokens_per_pack, seed, blocks

    def passes(self, start: int = 0) -> Iterator[list[int]]:
        """Packs from number `start` on, counted from the first pass."""
        for number in count():
            for pack in self._packs(number):
                if start:
                    start -= 1
                else:
                    yield pack

    def packs_in(self, passes: float) -> int:
        """Packs of so many passes; a part of a pass counts in proportion, rounded up."""
        total, number = 0, 0
        while passes > 0:
            packs = sum(1 for _ in self._packs(number))
            total += int(np.ceil(packs * min(1.0, passes)))
            passes, number = passes - 1, number + 1
        return total

    @property
    def window(self) -> int:
        """Conversations of a window, about."""
        blocks = len(divided(len(self.lengths), self.blocks))
        return min(WINDOW, WINDOW_BLOCKS * len(self.lengths) // max(1, blocks))

    def _packs(self, number: int) -> Iterator[list[int]]:
        return _packs_by_window(self.lengths, self.tokens_per_pack, self.seed, number, self.blocks)


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
