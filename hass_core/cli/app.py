"""The `hass` command: collects the verbs and turns a user's mistake into one sentence and exit status 2."""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from hass_core import __version__
from hass_core.cli import bench, chat, doctor, drafts, evaluate, forecast, init, plan, run, serve, store
from hass_core.cli.common import complain, notes
from hass_core.errors import INTERRUPTED, USER_ERROR, sentence_of

app = typer.Typer(
    help="Train, measure and export HASS draft models for speculative decoding.",
    epilog="Exit status: 0 done, 1 findings (doctor), 2 a mistake of the user's, told in one sentence on stderr, "
    "130 stopped by Ctrl-C.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command()(init.init)
app.command()(run.run)
app.command()(run.presets)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(evaluate.evaluate)
app.command()(plan.plan)
app.command("forecast")(forecast.show_forecast)
app.command()(drafts.export)
app.command("import")(drafts.import_)
app.add_typer(doctor.app, name="doctor", help="Find out what is wrong with data or a draft.")
app.add_typer(store.app, name="store", help="See what the store holds, and remove what nobody needs.")
app.add_typer(bench.app, name="bench", help="Measure this machine; the last line printed is JSON.")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hass {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `hass` command. Exits with 1 for findings, 2 for a user's mistake, 130 after Ctrl-C."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        status = app(arguments, prog_name="hass", standalone_mode=False)
    except typer.TyperException as error:  # the command line itself
        complain(f"{_plain(error.format_message())}; {_command(error)} --help says more")
        sys.exit(USER_ERROR)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        complain(sentence)
        sys.exit(USER_ERROR)
    if status == INTERRUPTED:
        notes.print("stopped; what is finished is kept")
    sys.exit(status if isinstance(status, int) else 0)


def _plain(message: str) -> str:
    return " ".join(message.replace("Value error, ", "").split()).rstrip(".")


def _command(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "hass"
