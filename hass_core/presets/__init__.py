"""The shipped settings, by name, and the shapes of the targets that they name.

A preset is a TOML file of this folder; it, or a file of the user's, may name another that it `extends`: then only what
differs stands in it. `shapes.json` holds the sizes in the targets' config.json, so that what a preset costs can be told
without the target.
"""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from hass_core.errors import ConfigError
from hass_core.settings import overlaid, read_toml

FOLDER = resources.files(__name__)


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(p.name.removesuffix(".toml") for p in FOLDER.iterdir() if p.name.endswith(".toml"))


def read_settings(source: str | Path) -> dict[str, Any]:
    """The tables of a preset or a .toml file, over those of the preset that it extends. Raises ConfigError."""
    values = _read_one(source)
    base = values.pop("extends", None)
    if base is None:
        return values
    if base not in preset_names() or str(source) == base:
        raise ConfigError(f"{source}: extends = {base!r} is no other preset; presets are {', '.join(preset_names())}")
    return overlaid(read_settings(base), values)


def _read_one(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix == ".toml":
        return read_toml(path)
    if str(source) not in preset_names():
        near = difflib.get_close_matches(str(source).lower(), preset_names(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"no preset named {str(source)!r}; {meant}presets are {', '.join(preset_names())}, or a .toml file"
        )
    with resources.as_file(FOLDER / f"{source}.toml") as preset:
        return read_toml(preset)


def recorded_shapes() -> dict[str, dict[str, Any]]:
    """By target source: `config`, the sizes in its config.json; `gated`, whether the hub wants its terms accepted."""
    return json.loads((FOLDER / "shapes.json").read_text(encoding="utf-8"))
