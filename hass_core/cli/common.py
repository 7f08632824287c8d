"""What the verbs share: options, progress on the terminal, and one-line errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hass_core.config import RunConfig, load_config
from hass_core.progress import Progress as Report

console = Console()

ConfigName = Annotated[str, typer.Option("--config", "-c", help="Preset name or path of a .toml file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override a setting: section.key=value", metavar="KEY=VALUE")
]


def settings(config: str, overrides: list[str] | None) -> RunConfig:
    """The run's settings from --config and --set."""
    return load_config(config, overrides or [])


def show(text: str) -> None:
    """One line of text as it is, never broken or coloured: paths and commands stay whole for pasting."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A progress bar as the callback that the stages take."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield report
