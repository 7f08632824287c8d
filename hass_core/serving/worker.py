"""One thread decodes for all requests: every running one gets a cycle in turn, the others wait in line.

A request that nobody waits for any more is dropped before its next cycle, so its place is free at once.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hass_core.config import SamplingConfig
from hass_core.decoding.answers import Step, StopRule
from hass_core.decoding.decoder import Decoder

IDLE_SECONDS = 0.2  # how soon an idle worker notices that it shall end

Event = Step | Exception


class Busy(Exception):
    """The line of waiting requests is full."""


@dataclass(eq=False)
class Job:
    """One request. `emit` is called in the worker's thread for every step, or with the error that ended it."""

    prompt_token_ids: list[int]
    sampling: SamplingConfig
    max_new_tokens: int
    stop: StopRule
    emit: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Takes jobs from any thread. `observe` sees every step, for metrics."""

    def __init__(
        self, decoder: Decoder, max_running: int, max_waiting: int, observe: Callable[[Step], None] = lambda step: None
    ):
        self._decoder, self._max_running, self._observe = decoder, max_running, observe
        self._waiting: queue.Queue[Job] = queue.Queue(max_waiting)
        self._running: dict[Job, Iterator[Step]] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that get cycles."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return self._waiting.qsize()

    def submit(self, job: Job) -> None:
        """Put a job in line. Raises Busy when the line is full."""
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise Busy from None

    def close(self) -> None:
        """End the thread; jobs under way are dropped."""
        self._ending.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ending.is_set():
            self._admit()
            for job in list(self._running):
                self._advance(job)

    def _admit(self) -> None:
        """Start what is in line as far as there is room; wait a moment when there is nothing to do."""
        while len(self._running) < self._max_running:
            try:
                job = self._waiting.get(block=not self._running, timeout=IDLE_SECONDS)
            except queue.Empty:
                return
            stream = self._decoder.stream(job.prompt_token_ids, job.sampling, job.max_new_tokens, job.stop)
            self._running[job] = iter(stream)

    def _advance(self, job: Job) -> None:
        """One cycle; the job leaves when it has ended, failed or been cancelled."""
        if job.cancelled.is_set():
            del self._running[job]
            return
        try:
            step = next(self._running[job])
        except Exception as error:  # whatever it is, it belongs to this request alone
            del self._running[job]
            job.emit(error)
            return
        self._observe(step)
        if step.finished is not None:
            next(self._running.pop(job), None)  # lets the decoder take its session back
        job.emit(step)
