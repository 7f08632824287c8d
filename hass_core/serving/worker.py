"""One thread decodes for all requests: every running one gets a cycle in turn, the others wait in line.

A request that nobody waits for any more is dropped before its next cycle, or leaves the line, so its place is free at
once. Should the thread itself die, every request is told, and so is whoever asks for the server's health.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hass_core.config import SamplingConfig
from hass_core.decoding.answers import Step, StopRule
from hass_core.decoding.decoder import Decoder

Event = Step | Exception


class Busy(Exception):
    """The line of waiting requests is full."""


class Unavailable(Exception):
    """This request cannot be answered now, through no fault of its own."""


@dataclass(eq=False)
class Job:
    """One request. `emit` is called in the worker's thread for every step, or with the error that ended it."""

    prompt_token_ids: list[int]
    sampling: SamplingConfig
    max_new_tokens: int
    stop: StopRule
    emit: Callable[[Event], None]
    started: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Takes jobs from any thread. `observe` sees every step, for metrics."""

    def __init__(
        self, decoder: Decoder, max_running: int, max_waiting: int, observe: Callable[[Step], None] = lambda step: None
    ):
        self._decoder, self._max_running, self._max_waiting = decoder, max_running, max_waiting
        self._observe = observe
        self._line: deque[Job] = deque()
        self._changed = threading.Condition()  # guards the line, `_ending` and `failure`
        self._running: dict[Job, Iterator[Step]] = {}
        self._ending = False
        self.failure: str | None = None  # why nothing is decoded any more
        self._thread = threading.Thread(target=self._live, name="decoding", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that get cycles."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    def submit(self, job: Job) -> None:
        """Put a job in line. Raises Busy when the line is full, Unavailable when nothing is decoded any more."""
        with self._changed:
            if self.failure:
                raise Unavailable(self.failure)
            if len(self._line) >= self._max_waiting:
                raise Busy
            self._line.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job, wherever it is; nothing is emitted for it that has not been yet."""
        job.cancelled.set()
        with self._changed:
            if job in self._line:
                self._line.remove(job)

    def close(self) -> None:
        """End the thread; jobs under way are dropped."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def _live(self) -> None:
        try:
            while self._admit():
                for job in list(self._running):
                    self._advance(job)
        except BaseException as error:
            self._die(f"the decoding thread has died of {type(error).__name__}: {error}")
            raise

    def _die(self, failure: str) -> None:
        with self._changed:
            self.failure = failure
            left = [*self._running, *self._line]
            self._line.clear()
        self._running.clear()
        for job in left:
            job.emit(Unavailable(failure))

    def _admit(self) -> bool:
        """Start what is in line as far as there is room, waiting while there is nothing to do. False: end."""
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._running or self._ending)
            while self._line and len(self._running) < self._max_running:
                job = self._line.popleft()
                job.started.set()
                stream = self._decoder.stream(job.prompt_token_ids, job.sampling, job.max_new_tokens, job.stop)
                self._running[job] = iter(stream)
            return not self._ending

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
