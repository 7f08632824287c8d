"""A stage's progress in three places: a Prefect progress artifact, log lines, and the terminal of an in-process run."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from hass_core.progress import Progress, no_progress
from tasks.prefect_outage import prefect_outage_in

UPDATE_SECONDS = 2.0
LOG_SECONDS = 30.0

terminal: ContextVar[Progress] = ContextVar("terminal", default=no_progress)
"""Set by a flow that runs in a terminal; called as (done, total, "stage: note")."""

say: ContextVar[Callable[[str], None]] = ContextVar("say", default=lambda line: None)
"""Set by a flow that runs in a terminal; called with each line that stays there."""


class Reporter:
    """A `Progress` callback; a thread of its own tells Prefect every two seconds.

    A server that is away or slow neither holds the work up nor ends it: progress is only looked at.
    """

    def __init__(self, stage: str, artifact: UUID):
        self._stage, self._artifact = stage, artifact
        self._logged, self._percent = time.monotonic(), 0.0
        self._logger = get_run_logger()
        self._away = False
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._follow,), name=f"{stage}-progress", daemon=True
        )
        self._thread.start()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        terminal.get()(done, total, f"{self._stage}: {note}")
        now, last = time.monotonic(), done >= total
        self._percent = 100.0 * done / max(1, total)
        if last or now - self._logged >= LOG_SECONDS:
            self._logger.info("%s: %d of %d %s", self._stage, done, total, note)
            self._logged = now

    def end(self, well: bool) -> None:
        """Show no more; after a good end the bar is full."""
        self._ended.set()
        if well:
            self._thread.join()
            self._show(100.0)

    def _follow(self) -> None:
        shown = 0.0
        while not self._ended.wait(UPDATE_SECONDS):
            if (percent := self._percent) != shown:
                self._show(percent)
                shown = percent

    def _show(self, percent: float) -> None:
        try:
            update_progress_artifact(self._artifact, progress=percent)
            self._away = False
        except httpx.HTTPError as error:
            if not self._away:  # told once
                why = prefect_outage_in(error) or f"Prefect takes no progress ({error})"
                self._logger.warning("%s", why)
                say.get()(f"{why}; the stage {self._stage} goes on meanwhile")
            self._away = True


@contextmanager
def reporting(stage: str) -> Iterator[Progress]:
    """The progress callback of one stage; the bar is full when the block ends well."""
    artifact = create_progress_artifact(progress=0.0, key=f"{stage}-progress", description=f"Progress of {stage}")
    assert isinstance(artifact, UUID)
    reporter, well = Reporter(stage, artifact), False
    try:
        yield reporter
        well = True
    finally:
        reporter.end(well)
