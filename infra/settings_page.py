"""docs/settings.md, from the settings themselves: `python -m infra.settings_page > docs/settings.md`."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hass_core.config import RunConfig

HEAD = """# All settings

Made by `python -m infra.settings_page` from `hass_core/config.py`; a test keeps it current. A file sets them in tables
(`[training]`, `passes = 2`), a command by `-s training.passes=2`. `-s training.max_steps=none` clears one; a file
leaves its line out.
"""
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """The whole page."""
    lines = [HEAD, *_table("", RunConfig)]
    for name, field in RunConfig.model_fields.items():
        if (kind := section_of(field.annotation)) and name != "pretraining":
            lines += ["", f"## {name}", "", *_about(kind), *_table(f"{name}.", kind)]
    return "\n".join(lines) + "\n"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The table's class where the annotation is one, or one that may be left out."""
    members = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)


def _about(kind: type[BaseModel]) -> list[str]:
    return [kind.__doc__.strip().splitlines()[0], ""] if kind.__doc__ else []


def _table(prefix: str, kind: type[BaseModel]) -> Iterator[str]:
    yield "| setting | default | values | meaning |"
    yield "|---|---|---|---|"
    for name, field in kind.model_fields.items():
        if section_of(field.annotation) and name != "pretraining":
            continue
        cells = (f"`{prefix}{name}`", _default(field), _values(field), field.description or "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return ""  # the description tells it
    value = field.default
    if isinstance(value, tuple):
        value = [inner.model_dump() if isinstance(inner, BaseModel) else inner for inner in value]
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(field: FieldInfo) -> str:
    return ", ".join([_kind(field.annotation), *_bounds(field.metadata)])


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for entry in metadata:
        yield from (f"{sign} {getattr(entry, name):,}" for name, sign in BOUNDS.items() if hasattr(entry, name))


def _kind(annotation: Any) -> str:
    """The type in words; a choice by its values."""
    if get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        inner = (entry.metadata if isinstance(entry, FieldInfo) else [entry] for entry in metadata)
        return ", ".join([_kind(kind), *(bound for entries in inner for bound in _bounds(entries))])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (UnionType, Union):
        return " or ".join(_kind(member) for member in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {_kind(get_args(annotation)[0])}"
    if annotation is type(None):
        return "none"
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}
    return names.get(annotation.__name__, "table")


if __name__ == "__main__":
    print(page(), end="")
