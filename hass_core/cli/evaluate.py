"""`hass evaluate`: a draft and its rivals on the same questions."""

from pathlib import Path
from typing import Annotated

import typer

from hass_core.cli.common import ConfigName, Overrides, console, progress_bar, settings
from hass_core.errors import BadInput


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command()(evaluate)


def evaluate(
    draft: Annotated[list[str], typer.Option(help="Draft folder, or METHOD=FOLDER (eagle2=…, eagle=…, sps=…)")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report, table and figures")],
    methods: Annotated[str, typer.Option(help="Comma-separated: plain,pld,sps,eagle,eagle2,hass")] = "plain,hass",
    benchmarks: Annotated[str | None, typer.Option(help="Comma-separated: heldout, NAME=FILE, a file, …")] = None,
    temperatures: Annotated[str | None, typer.Option(help="Comma-separated, such as 0,1")] = None,
    config: ConfigName = "smollm2-cpu",
    override: Overrides = None,
) -> None:
    """Measure drafts and rivals; prints the paper's table: speed-up and τ for each benchmark and temperature."""
    from hass_core.evaluation.evaluate import evaluate_folder  # imports torch: only when needed
    from hass_core.evaluation.terminal import terminal

    changes = list(override or [])
    if benchmarks:
        changes.append(f"evaluation.benchmarks={benchmarks.split(',')}")
    if temperatures:
        changes.append(f"evaluation.temperatures=[{temperatures}]")
    chosen = settings(config, changes)
    own, others = split_drafts(draft)
    with progress_bar("evaluate") as report:
        result = evaluate_folder(
            own, chosen.target, chosen.evaluation, chosen.tree, out, methods.split(","), others, report
        )
    console.print(terminal(result))
    console.print(f"report and figures are in {out}", highlight=False)


def split_drafts(given: list[str]) -> tuple[Path | None, dict[str, Path]]:
    """The draft under test, and those of other methods. Raises BadInput when two are given for one method."""
    drafts: dict[str, Path] = {}
    for entry in given:
        name, named, folder = entry.partition("=")
        method, path = (name, Path(folder)) if named else ("hass", Path(entry))
        if method in drafts:
            raise BadInput(f"two drafts for the method {method}: {drafts[method]} and {path}")
        drafts[method] = path
    return drafts.pop("hass", None), drafts
