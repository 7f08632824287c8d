"""What the verbs share: settings, progress, and how results and mistakes come to the terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic_core import to_json
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hass_core.config import RunConfig, load_config
from hass_core.progress import Progress as Report
from hass_core.target_model.source import check_source

console = Console()  # results
notes = Console(stderr=True)  # progress, remarks and mistakes: a pipe gets the results alone


def settings(config: str, overrides: list[str] | None) -> RunConfig:
    """The run's settings from --config and --set, their target known to be there. Raises ConfigError, TargetError."""
    chosen = load_config(config, overrides or [])
    check_source(chosen.target.source)
    return chosen


def show(text: str) -> None:
    """One line of text as it is, never broken or coloured: paths and commands stay whole for pasting."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_json(result: Any) -> None:
    """A result for programs: models, dataclasses and paths too; numbers that are none become null."""
    sys.stdout.write(to_json(result, indent=1, inf_nan_mode="null").decode() + "\n")


def complain(sentence: str) -> None:
    """Tell a mistake."""
    notes.print(f"[bold red]error:[/] {escape(sentence)}", highlight=False, soft_wrap=True, emoji=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A progress bar as the callback that the stages take; a file or a pipe gets none."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=notes, disable=not notes.is_terminal) as bar:
        task = bar.add_task(title, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield report
