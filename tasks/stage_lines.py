"""One line when a stage begins and one when it ends, with counts and times; for terminals and for logs alike."""

import time
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from hass_core.config import RunConfig
from hass_core.store import Artifact
from tasks.progress import say
from tasks.resources import store_of
from tasks.summary import stage_words

Made = TypeVar("Made")


def told(name: str, work: Callable[[], Made], words: Callable[[Made], str] = str) -> Made:
    """Do work between two lines on the terminal; `words` says what came of it. Of work that fails the first remains."""
    say.get()(f"{name:<12}started {time.strftime('%H:%M:%S')}")
    started = time.monotonic()
    made = work()
    say.get()(f"{name:<12}done in {time.monotonic() - started:.0f} s: {words(made)}")
    return made


def between_lines(config: RunConfig, stage: str, work: Callable[[], Artifact], seconds: dict[str, float]) -> Artifact:
    """Do a stage's work between two lines on the terminal; `seconds` takes its time unless it was finished."""
    say.get()(f"{stage:<12}started {time.strftime('%H:%M:%S')}")
    began, started = int(time.time()), time.monotonic()
    artifact = work()
    took = time.monotonic() - started
    manifest = store_of(config).open(artifact).manifest()
    made = datetime.fromisoformat(manifest.provenance["time"]).timestamp() >= began if manifest else True
    if made:
        seconds[stage] = took
    say.get()(f"{stage:<12}{'done in' if made else 'found finished,'} {took:.0f} s: {stage_words(artifact)}")
    return artifact
