"""`hass forecast`: what a preset costs, from its target's sizes alone."""

from typing import Annotated, get_args

import typer
from rich.table import Table

from hass_core.cli.common import console, notes, show, show_json
from hass_core.cli.options import AsJson, Overrides
from hass_core.config import Stage, load_config
from hass_core.forecast.forecast import DEFAULT_GPUS, Forecast, forecast
from hass_core.forecast.ready import present_gpus, time_without_gpu
from hass_core.forecast.rows import counted, not_counted
from hass_core.target_model.source import lacking


def show_forecast(
    preset: Annotated[str, typer.Argument(help="Preset name or path of a .toml file")] = "smollm2-cpu",
    gpus: Annotated[
        list[str] | None, typer.Option(help="Such as h100x8; h100, h200, a100, 4090", metavar="KIND")
    ] = None,
    conversations: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts in files and data sets; left out, the lines of local JSONL files"),
    ] = None,
    rates: Annotated[bool, typer.Option("--rates", help="The measured rates behind it, and each check")] = False,
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run needs and how long it takes: memory, disk, hours of each stage. Needs no weights.

    Example: hass forecast llama-3.1-8b --gpus h100x8
    """
    config = load_config(preset, override or [])
    unknown = not_counted(config.prompts, conversations)
    found = forecast(config, gpus or DEFAULT_GPUS, conversations or counted(config.prompts.files))
    if as_json:
        for line in unknown:
            notes.print(line, markup=False, highlight=False, soft_wrap=True)
        return show_json(found)
    lack = lacking(config.target.source)
    for line in [*found.lines(), *unknown, *([lack] if lack else [])]:
        show(line)
    for line in [] if gpus else time_without_gpu(config, present_gpus()):
        show(line)
    console.print(_hours(found))
    if rates:
        console.print(_rates(found))
        console.print(_checks(found))
        for assumed in found.assumed:
            show(f"assumed: {assumed}")
    show(found.checked())


def _hours(found: Forecast) -> Table:
    stages = get_args(Stage)
    table = Table("GPUs", *stages, "in all", title="hours; – where it does not fit into their memory")
    for row in found.hours:
        figures = (*(row.stages.get(stage) for stage in stages), row.total)
        table.add_row(row.gpus, *("–" if hours is None else f"{hours:.2f}" for hours in figures))
    return table


def _rates(found: Forecast) -> Table:
    table = Table("rate", "value", "measured in", title="rates")
    for rate in found.rates:
        table.add_row(rate.what, f"{rate.value:g}", rate.where)
    return table


def _checks(found: Forecast) -> Table:
    table = Table("checked", "forecast", "measured", "error", "measured in", title="checks")
    for check in found.checks:
        figures = f"{check.forecast:,.4g} {check.unit}", f"{check.measured:,.4g}", f"{check.error:+.0%}"
        table.add_row(check.what, *figures, check.where + (", fitted" if check.fitted else ""))
    return table
