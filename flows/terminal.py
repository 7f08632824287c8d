"""Run a flow from a terminal, in this process: progress on one line, then the result; errors in one sentence."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from flows.arguments import complain, read
from flows.collector import imported
from flows.prefect_server import check_server
from hass_core.config import RunConfig
from hass_core.errors import INTERRUPTED
from tasks.prefect_outage import prefect_outage_in
from tasks.progress import say, terminal
from tasks.summary import stage_table
from tasks.tracking import outage_or

SERVER_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
}

Show = Callable[[Console, RunConfig, Any], None]
Before = Callable[[RunConfig], Iterable[str]]


def main(flow: Flow[..., Any], show: Show | None = None, before: Before = lambda config: ()) -> None:
    """Read the command line, run the flow, print what came out. Exits with 2 after a user's mistake.

    `before` gives lines to print first, and refuses what cannot end well; not where stages run on other machines.
    Arguments are a preset's name (optional, first) and changes as `section.key=value`; see `flows.arguments`.
    """
    console, started = Console(), time.monotonic()
    imported()
    try:
        run = read(flow.name.replace("-", "_"), sys.argv[1:])
        config = run.config()  # a wrong setting is told before anything starts
        check_server()
        for line in () if run.deployments else before(config):
            console.print(line, highlight=False, soft_wrap=True)
        with _progress(console), _quiet_prefect():
            result = flow(run)
    except KeyboardInterrupt:
        print("stopped; the same command continues from what is finished", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        complain(prefect_outage_in(error) or outage_or(error))
    (show or _show_stage)(console, config, result)
    console.print(f"took {time.monotonic() - started:.0f} s", highlight=False)


def _show_stage(console: Console, config: RunConfig, result: Any) -> None:
    console.print(stage_table(result))


@contextmanager
def _quiet_prefect() -> Iterator[None]:
    """Prefect's log stays in its database; the server started for this run may take its time on a busy machine."""
    for name, value in SERVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).setLevel(os.environ.get("PREFECT_LOGGING_LEVEL", "CRITICAL"))
    # a page for each event that a server away misses; a level would not stay
    logging.getLogger("prefect._internal.concurrency").addFilter(lambda record: record.levelno >= logging.CRITICAL)
    with temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120}):
        with _deaf_to_ctrl_c(), get_client(sync_client=True):
            pass  # starts that server
        yield


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started here never see Ctrl-C: the server must outlive this one to take down how the run ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _progress(console: Console) -> Iterator[None]:
    """A line when a stage begins and ends; on a terminal one more that follows the present stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("starting", total=None)

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(line, completed=done, total=total, description=note)

        tokens = terminal.set(update), say.set(lambda line: console.print(line, highlight=False, soft_wrap=True))
        try:
            yield
        finally:
            terminal.reset(tokens[0])
            say.reset(tokens[1])
