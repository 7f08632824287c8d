"""Feeding the loop: the micro-batches of each optimizer step, read in the background.

An optimizer step takes `processes × accumulation_steps × packs_per_batch` consecutive packs of the stream, so what it
trains on does not depend on how they are divided: 8 micro-batches of 1 pack equal 1 of 8, on 1 process or on many.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from hass_core.training.batch import Batch, Conversation, collate
from hass_core.training.packing import PackStream

STEPS_AHEAD = 2


class Dataset(Protocol):
    """Random access to conversations."""

    def many(self, indices: Sequence[int]) -> Sequence[Conversation]: ...


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


def micro_batches(
    dataset: Dataset, stream: PackStream, division: Division, align_steps: int, start_step: int, pin: bool = False
) -> Iterator[list[Batch]]:
    """For each optimizer step from `start_step` on, this process's micro-batches."""
    packs = stream.passes(start_step * division.packs_per_step)
    while True:
        step = list(islice(packs, division.packs_per_step))
        batches = [collate(dataset.many(group), align_steps) for group in division.mine(step)]
        yield [batch.pin_memory() for batch in batches] if pin else batches


class Prefetcher:
    """Runs an iterator in a thread, a few items ahead. An exception in it is raised where its item was due."""

    def __init__(self, source: Iterator[Any], ahead: int = STEPS_AHEAD):
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(source,), daemon=True)
        self._thread.start()

    def __next__(self) -> Any:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        while self._thread.is_alive():
            with self._queue.mutex:
                self._queue.queue.clear()
                self._queue.not_full.notify_all()
            self._thread.join(0.05)

    def _fill(self, source: Iterator[Any]) -> None:
        try:
            while not self._stopped.is_set():
                self._queue.put(next(source))
        except BaseException as error:  # handed to the consumer
            self._queue.put(error)


def noisy(batch: Batch, half_width: float, seed: int) -> torch.Tensor:
    """The batch's features plus uniform noise; the same noise for the same seed."""
    if half_width == 0:
        return batch.features
    generator = torch.Generator(batch.features.device).manual_seed(seed)
    noise = torch.empty(batch.features.shape, device=batch.features.device)
    return batch.features + noise.uniform_(-half_width, half_width, generator=generator)
