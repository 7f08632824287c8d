"""`hass bench`: measure this machine; each verb prints one JSON line last. `python -m hass_core.bench.NAME` is the same.

Options are read and checked here. The benchmarks themselves load torch, and nothing of the product depends on them:
they are imported by name, when they run.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hass_core.cli.options import DraftOption, Overrides, TargetSource, out_folder
from hass_core.config import TreeConfig, parse_config, read_settings
from hass_core.errors import ConfigError

app = typer.Typer()
Shape = Literal["smollm2-135m", "llama3-8b", "tiny"]
Optional = Annotated[str | None, typer.Option("--config", "-c", help="Preset or .toml file to take settings from")]


def _run(module: str, **options: Any) -> None:
    import_module(f"hass_core.bench.{module}").run(**options)


def _settings(config: str | None, overrides: list[str] | None, given: dict[str, Any]) -> Any:
    """The settings of a file, if one is named, changed by --set, then by the options of their own."""
    values = read_settings(config) if config else {}
    changed = [f"{name}={value}" for name, value in given.items() if value is not None]
    return parse_config(values, [*(overrides or []), *changed], where=config or "settings")
