"""`hass run` and `hass presets`: the stages by hand."""

from typing import Annotated, cast

import typer
from rich.table import Table

from hass_core.cli.common import ConfigName, Overrides, console, progress_bar, settings
from hass_core.config import load_config, preset_names


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command()(run)
    app.command()(presets)


def run(
    stage: Annotated[str, typer.Argument(help="prompts, responses, features, draft or evaluation")] = "evaluation",
    config: ConfigName = "smollm2-cpu",
    override: Overrides = None,
) -> None:
    """Run the pipeline up to a stage; finished stages are reused."""
    from hass_core.stages import STAGES, Stage, run_until  # imports torch: only when needed

    if stage not in STAGES:
        raise typer.BadParameter(f"{stage!r} is not one of {', '.join(STAGES)}")
    chosen = settings(config, override)
    with progress_bar(stage) as report:

        def progress_for(name: Stage):
            return lambda done, total, note="": report(done, total, f"{name}: {note}")

        artifacts = run_until(cast(Stage, stage), chosen, progress_for)
    table = Table("stage", "digest", "summary", title=chosen.name)
    for name, artifact in artifacts.items():
        summary = ", ".join(f"{key} {_short(value)}" for key, value in artifact.summary.items())
        table.add_row(name, artifact.digest, summary)
    console.print(table)
    console.print(f"results are in {artifacts[cast(Stage, stage)].url}", highlight=False)


def presets() -> None:
    """List the shipped presets."""
    table = Table("preset", "target", "align steps", "passes")
    for name in preset_names():
        preset = load_config(name)
        table.add_row(name, preset.target.source, str(preset.training.align_steps), f"{preset.training.passes:g}")
    console.print(table)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
