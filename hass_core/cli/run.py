"""`hass run` and `hass presets`: the stages by hand."""

from typing import Annotated

import typer
from rich.table import Table

from hass_core.cli.common import console, progress_bar, settings, show, show_json
from hass_core.cli.draft_address import find_draft
from hass_core.cli.options import AsJson, ConfigName, Overrides
from hass_core.config import Stage, load_config, preset_names
from hass_core.draft_model.shipped import SHIPPED
from hass_core.evaluation.benchmark_names import check_benchmarks


def run(
    stage: Annotated[Stage, typer.Argument(help="The last stage to run")] = "evaluation",
    config: ConfigName = "smollm2-cpu",
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline up to a stage; finished stages are reused.

    Example: hass run draft -c smollm2-cpu -s training.passes=2
    """
    chosen = settings(config, override)
    if chosen.draft.warm_start not in (None, SHIPPED):
        find_draft(chosen.draft.warm_start)
    from hass_core.data.live import check_local  # imports transformers

    check_local(chosen.prompts.files)
    check_benchmarks(chosen.evaluation.benchmarks)  # no question of theirs may be trained on
    from hass_core.store import Store

    Store(chosen.store).check_writable()
    from hass_core.stages import run_until  # imports torch: only when the settings are right

    with progress_bar(stage) as report:

        def progress_for(name: Stage):
            return lambda done, total, note="": report(done, total, f"{name}: {note}")

        artifacts = run_until(stage, chosen, progress_for)
    if as_json:
        return show_json({name: {"url": a.url, **a.model_dump()} for name, a in artifacts.items()})
    table = Table("stage", "digest", "summary", title=chosen.name)
    for name, artifact in artifacts.items():
        summary = ", ".join(f"{key} {_short(value)}" for key, value in artifact.summary.items())
        table.add_row(name, artifact.digest, summary)
    console.print(table)
    show(f"results are in {artifacts[stage].url}")


def presets(as_json: AsJson = False) -> None:
    """List the shipped presets."""
    if as_json:
        return show_json({name: load_config(name) for name in preset_names()})
    table = Table("preset", "target", "align steps", "passes")
    for name in preset_names():
        preset = load_config(name)
        table.add_row(name, preset.target.source, str(preset.training.align_steps), f"{preset.training.passes:g}")
    console.print(table)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
