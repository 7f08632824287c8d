"""Run a flow from a terminal, in this process: progress on one line, then the result; errors in one sentence."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import Flow
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from flows.parameters import RunParameters
from hass_core.errors import HassError
from tasks.progress import terminal
from tasks.summary import show

USER_ERROR, INTERRUPTED = 2, 130
console = Console()


def main(flow: Flow[[RunParameters], Any]) -> None:
    """Read PRESET and overrides from the command line, run the flow, print what came out, exit."""
    preset, overrides = _arguments(sys.argv[1:])
    started = time.monotonic()
    try:
        run = RunParameters(preset=preset, overrides=overrides)
        config = run.config()  # a wrong setting is told before anything starts
        with _quiet_prefect(), _progress():
            result = flow(run)
    except HassError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        console.print("stopped; the same command continues from what is finished")
        sys.exit(INTERRUPTED)
    show(console, config, result, time.monotonic() - started)


def _arguments(arguments: list[str]) -> tuple[str, list[str]]:
    if arguments and "=" not in arguments[0]:
        return arguments[0], arguments[1:]
    return "smollm2-cpu", arguments


@contextmanager
def _quiet_prefect() -> Iterator[None]:
    """Prefect's own log goes to its database, not to the terminal; a slow machine may take its time to start."""
    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).setLevel(os.environ.get("PREFECT_LOGGING_LEVEL", "CRITICAL"))
    with temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120}):
        yield


@contextmanager
def _progress() -> Iterator[None]:
    """One line that follows the present stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("starting", total=None)

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(line, completed=done, total=total, description=note)

        token = terminal.set(update)
        try:
            yield
        finally:
            terminal.reset(token)
