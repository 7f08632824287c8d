"""What all settings have in common: the base of their models, and how values are read, changed and refused."""

import difflib
import json
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args
from urllib.parse import urlsplit

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hass_core.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """Base of all settings: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    removed: ClassVar[dict[str, str]] = {}  # settings of earlier versions, and what to do instead
    idle: ClassVar[frozenset[str]] = (
        frozenset()
    )  # settings of earlier versions that decided nothing: old files still hold

    @model_validator(mode="before")
    @classmethod
    def _without_idle(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if k not in cls.idle} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _recordable(self) -> "Settings":
        for name, value in self:
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    _check_text(name, text)
        return self


def _check_text(name: str, text: str) -> None:
    """Raise ValueError for what cannot be recorded: a secret, or characters that no file and no database takes."""
    if "\0" in text or text.encode(errors="replace") != text.encode(errors="surrogatepass"):
        raise ValueError(f"{name} holds characters that are no text: {text!a}")
    if "://" in text and _has_password(text):
        raise ValueError(f"{name} holds a password, and settings are recorded; give it by the environment")


def _has_password(url: str) -> bool:
    try:
        return bool(urlsplit(url).password)
    except ValueError as error:  # brackets that do not close
        raise ValueError(f"{url!r} is no valid address: {error}") from None


def _address(url: str, info: ValidationInfo) -> str:
    """A server's address. A name in it is refused even without a password: it may be a key."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not url.isprintable() or not {" ", "\\"}.isdisjoint(url):
        raise ValueError(f"{info.field_name} = {url!r} is no address; give it as http://HOST:PORT/…")
    if "@" in urlsplit(url).netloc:
        raise ValueError(f"{info.field_name} holds the name of a user, and settings are recorded; leave it out")
    return url


def _pattern(text: str, info: ValidationInfo) -> str:
    try:
        regex.compile(text)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{info.field_name}: {text!r} is no regular expression: {error}") from None
    return text


def _command(line: str, info: ValidationInfo) -> str:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{info.field_name} = {line!r} is no command line: {error}") from None
    if not words:
        raise ValueError(f"{info.field_name} = {line!r} names no program; leave it out")
    return line


Name = Annotated[str, StringConstraints(min_length=1)]  # an empty path would be the folder one is in
Address = Annotated[str, AfterValidator(_address)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Command = Annotated[str, AfterValidator(_command)]


def validated(
    model: type[Model], values: dict[str, Any], where: str, places: Mapping[tuple[str, ...], str] | None = None
) -> Model:
    """`values` as a `model`. Raises ConfigError naming each wrong one, `where` it stands and the nearest known name.

    `places`: where single settings stand instead, by the names of their sections and their own.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors()
    inner = {problem["loc"][:-1] for problem in found}  # a list is not at fault for being empty without its bad items
    problems: dict[str, list[str]] = {}
    for problem in found:
        if problem["loc"] not in inner or not problem["loc"]:
            place = _place(problem["loc"], where, places or {})
            problems.setdefault(place, []).append(_explain(problem, model))
    raise ConfigError("; ".join(f"{place}: {_several(told)}" for place, told in problems.items()))


def _several(problems: list[str]) -> str:
    count = f"{len(problems)} bad settings: " if len(problems) > 1 else ""
    return f"{count}{'; '.join(problems)}"


def _place(location: tuple[int | str, ...], where: str, places: Mapping[tuple[str, ...], str]) -> str:
    """Where the setting at `location` stands. A section that does not agree with itself may stand in two places."""
    exact = [place for names, place in places.items() if names == location[: len(names)]]
    inside = [place for names, place in places.items() if location == names[: len(location)]]
    if exact:
        return exact[-1]
    return " with ".join(dict.fromkeys([where, *inside]))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"settings file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or brackets without end
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def as_toml(settings: Settings) -> tuple[str, list[str]]:
    """The settings that differ from the defaults as a TOML file, and those that are cleared, as `key=none`.

    TOML has no word for None: what is cleared goes on the command line.
    """
    tables, cleared = _differing(settings, type(settings)().model_dump(mode="json"))
    lines: list[str] = []
    for table, values in sorted(tables.items()):
        lines += ["", f"[{table}]"] if table else []
        lines += [f"{name} = {toml_value(value)}" for name, value in values.items()]
    return "\n".join(lines).strip() + "\n", cleared


def _differing(settings: Settings, defaults: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Values that differ by table ("" = none) and name, and the names of those that are None now."""
    tables: dict[str, dict[str, Any]] = {"": {}}
    cleared: list[str] = []
    for table, values, before in _sections(settings, defaults):
        changed = {name: value for name, value in values.items() if value != before[name]}
        cleared += [f"{table}.{name}=none".removeprefix(".") for name, value in changed.items() if value is None]
        if changed or (table and defaults[table] is None):
            tables[table] = {name: value for name, value in changed.items() if value is not None}
    return tables, cleared


def _sections(settings: Settings, defaults: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each table's name, its values and its defaults; a table that may be left out has those of its kind."""
    values = settings.model_dump(mode="json")
    inner = {name: value for name, value in settings if isinstance(value, Settings)}
    yield "", {name: value for name, value in values.items() if name not in inner}, defaults
    for name, section in inner.items():
        yield name, values[name], defaults[name] or type(section)().model_dump(mode="json")


def toml_value(value: Any) -> str:
    """A value of settings; strings and lists are written as in JSON, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def overlaid(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, table by table."""
    both = {name: overlaid(base[name], new) for name, new in changes.items() if _both_tables(base.get(name), new)}
    return base | changes | both


def _both_tables(a: object, b: object) -> bool:
    return isinstance(a, dict) and isinstance(b, dict)


def apply_override(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Put `section.key=value` into nested settings; the value in TOML's syntax, a bare word is a string, none is None.

    Returns the names of the sections and of the setting. Raises ConfigError where it is of another form, or where the
    section is a value.
    """
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = None if text.lower() == "none" else text  # a bare word is a string
    *sections, key = name.strip().split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        elif not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is {inner!r}, not a section of settings")
        values = inner
    values[key] = value
    return (*sections, key)


def _explain(problem: ErrorDetails, model: type[BaseModel]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    kind, given = problem["type"], f"{name} = {problem['input']!r}"
    if kind == "extra_forbidden":
        return _unknown(name, problem["loc"], model)
    if kind == "value_error":  # our own checks: the message names the setting
        return problem["msg"].removeprefix("Value error, ")
    if kind == "model_type":
        return f"{given}: this is a section; name a setting in it, as {name}.KEY=VALUE"
    field = _field(problem["loc"], model)
    if kind == "string_pattern_mismatch" and field is not None and field.description:
        return f"{given}: not one of {field.description}"
    if isinstance(problem["input"], str) and problem["input"].lower() == "none" and _may_be_none(field):
        return f"{given}: a file has no word for none; leave the line out, or say {name}=none on the command line"
    return f"{given}: {problem['msg'].lower()}"


def _may_be_none(field: FieldInfo | None) -> bool:
    return field is not None and type(None) in get_args(field.annotation)


def _unknown(name: str, location: tuple[Any, ...], model: type[BaseModel]) -> str:
    section, key = _section(location, model), str(location[-1])
    if section and issubclass(section, Settings) and key in section.removed:
        return f"{name} {section.removed[key]}"
    matches = difflib.get_close_matches(key, section.model_fields if section else (), n=1)
    meant = [".".join(map(str, (*location[:-1], match))) for match in matches] or _elsewhere(key, model)
    nearest = f"; did you mean {' or '.join(meant)}?" if meant else ""
    return f"{name}: no such setting{nearest}"


def _elsewhere(key: str, model: type[BaseModel]) -> list[str]:
    """Settings of that name in the other sections."""
    sections = (
        (name, _section((name, key), model)) for name, field in model.model_fields.items() if field.default is not None
    )
    return [f"{name}.{key}" for name, section in sections if section and key in section.model_fields]


def _field(location: tuple[Any, ...], model: type[BaseModel]) -> FieldInfo | None:
    section = _section(location, model)
    return section.model_fields.get(str(location[-1])) if section else None


def _section(location: tuple[Any, ...], model: type[BaseModel]) -> type[BaseModel] | None:
    """The settings in which the last part of `location` stands; None inside a list."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        found = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not found:  # a section that may be absent is `Section | None`
            return None
        model = found[0]
    return model
