"""The `hass` command: collects the verbs and turns a HassError into one clear message and exit status 2."""

import logging
import sys

import typer
from rich.markup import escape

from hass_core.cli import bench, chat, doctor, drafts, evaluate, plan, run, serve
from hass_core.cli.common import console
from hass_core.errors import HassError

app = typer.Typer(
    help="Train, measure and export HASS draft models for speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
run.register(app)
chat.register(app)
serve.register(app)
evaluate.register(app)
plan.register(app)
drafts.register(app)
app.add_typer(doctor.app, name="doctor", help="Find out what is wrong with data or a draft.")
app.add_typer(bench.app, name="bench", help="Measure this machine; the last line printed is JSON.")


def main() -> None:
    """Entry point of the `hass` command."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except HassError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("stopped; the same command continues where it was")
        sys.exit(130)
