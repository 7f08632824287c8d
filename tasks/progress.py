"""A stage's progress in three places: a Prefect progress artifact, log lines, and the terminal of an in-process run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from hass_core.progress import Progress, no_progress

UPDATE_SECONDS = 2.0
LOG_SECONDS = 30.0

terminal: ContextVar[Progress] = ContextVar("terminal", default=no_progress)
"""Set by a flow that runs in a terminal; called as (done, total, "stage: note")."""


class Reporter:
    """A `Progress` callback that calls Prefect no more often than every two seconds."""

    def __init__(self, stage: str, artifact: UUID):
        self._stage, self._artifact = stage, artifact
        self._updated = self._logged = time.monotonic()
        self._logger = get_run_logger()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        terminal.get()(done, total, f"{self._stage}: {note}")
        now, last = time.monotonic(), done >= total
        if last or now - self._updated >= UPDATE_SECONDS:
            update_progress_artifact(self._artifact, progress=100.0 * done / max(1, total))
            self._updated = now
        if last or now - self._logged >= LOG_SECONDS:
            self._logger.info("%s: %d of %d %s", self._stage, done, total, note)
            self._logged = now


@contextmanager
def reporting(stage: str) -> Iterator[Progress]:
    """The progress callback of one stage; the bar is full when the block ends well."""
    artifact = create_progress_artifact(progress=0.0, key=f"{stage}-progress", description=f"Progress of {stage}")
    assert isinstance(artifact, UUID)
    yield Reporter(stage, artifact)
    update_progress_artifact(artifact, progress=100.0)
