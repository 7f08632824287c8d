"""Sources that grow: folders, patterns and prefixes of files, and datasets, as they are when a run starts.

What `prompts.files` and `prompts.datasets` name is resolved once, into files with their content's identity and into
revisions, so that a run with nothing new is known to be one, and of an old run it is known what it read. A window keeps
the newest conversations, by the time that a field of each row gives, else by the time of its file.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from hass_core.config import PromptsConfig
from hass_core.data.conversations import Record
from hass_core.data.file_names import COMPRESSIONS, FORMATS, is_readable, plain_name
from hass_core.data.sources import (
    Row,
    Skipped,
    conversation,
    dataset_rows,
    named_failures,
    read_dataset,
    read_file,
    rows_of,
    split_name,
    unique,
)
from hass_core.errors import BadInput
from hass_core.store import digest_of, sha256_of

PATTERN = set("*?[")
CONTENT_TAGS = ("ETag", "md5Hash")  # what S3 and Google's store say of an object's content, whenever it was put there
BUILTIN = "builtin"  # the source of the project's own prompts
SECONDS_A_DAY = 86_400.0
FRACTIONS_FROM = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))  # numbers above count ns, µs and ms: as the next larger
# unit they would lie beyond the year 5000


@dataclass(frozen=True)
class File:
    """One file of conversations: where it is, what its rows are called, and what it holds."""

    url: str
    source: str
    prefix: str  # of its rows' ids
    modified: float  # seconds since 1970
    content: str  # SHA-256, or the remote store's own tag


@dataclass(frozen=True)
class Dataset:
    """One dataset at a revision: a commit of the hub, or the content of a local folder."""

    name: str
    prefix: str  # of its rows' ids
    revision: str
    is_local: bool

    @property
    def source(self) -> str:
        """What its conversations are called."""
        return _source_of(self.name)

    def key(self) -> list[str]:
        """What decides the conversations read from here."""
        return [self.name, self.revision, *([] if self.prefix == self.source else [self.prefix])]


@dataclass(frozen=True)
class Sources:
    """All that the settings name, resolved."""

    files: tuple[File, ...]
    datasets: tuple[Dataset, ...]

    def key(self) -> dict[str, Any]:
        """What decides the conversations read from here."""
        return {
            "files": [[file.source, file.prefix, file.content] for file in self.files],
            "datasets": [dataset.key() for dataset in self.datasets],
        }


def resolve(config: PromptsConfig) -> Sources:
    """Look up files and revisions. Raises BadInput for one that is not there."""
    names = _made_distinct([*map(_name, config.files), *(_source_of(name) for name in config.datasets)])
    files: dict[str, File] = {}
    for entry, name in zip(config.files, names, strict=False):
        for file in _files(entry, name):
            files.setdefault(file.url, file)
    datasets = zip(config.datasets, names[len(config.files) :], strict=True)
    return Sources(tuple(files.values()), tuple(_dataset(name, prefix) for name, prefix in datasets))


def _made_distinct(names: list[str]) -> list[str]:
    """The same names with numbers where two are alike: rows of two sources must not share an id."""
    counts, found = Counter([BUILTIN, *names]), []
    for number, name in enumerate(names, start=1):
        chosen = name if counts[name] == 1 else f"{name}-{number}"
        while chosen != name and chosen in counts:
            chosen += f"-{number}"
        found.append(chosen)
    return found


def check_local(entries: Iterable[str]) -> None:
    """Raise BadInput for a file, folder or pattern of this machine that leads to nothing; no file is read."""
    for entry in entries:
        with named_failures(entry, "listed"):
            fs, path = fsspec.core.url_to_fs(entry)
            there = not isinstance(fs, LocalFileSystem) or fs.isfile(path) or _listed(fs, path)
        if not there:
            raise _nothing(entry)


def conversations_of(sources: Sources) -> Iterator[Record | Skipped]:
    """All conversations, in the order of the settings. Raises BadInput for a broken row."""
    for file in sources.files:
        yield from read_file(file.url, file.source, file.prefix)
    for dataset in sources.datasets:
        yield from read_dataset(dataset.name, _revision(dataset), dataset.prefix)


def newest_of(sources: Sources, config: PromptsConfig, now: datetime | None = None) -> list[Record | Skipped]:
    """The conversations inside the window of the settings, the oldest first. Raises BadInput."""
    oldest = -float("inf")
    if config.last_days is not None:
        oldest = (now or datetime.now(UTC)).timestamp() - config.last_days * SECONDS_A_DAY
    if config.time_field is None:
        return _by_file(sources, oldest, config.newest)
    return list(unique(_by_field(sources, oldest, config.newest, config.time_field)))


def seconds_of(value: Any) -> float | None:
    """Seconds since 1970 of a time as logs write it: a number of s, ms, µs or ns, or ISO 8601; else None."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        try:
            return seconds_of(datetime.fromisoformat(value))
        except (TypeError, ValueError, OverflowError):
            return None
    if not abs(number) < 1e20:
        return None
    return number / next((per_second for least, per_second in FRACTIONS_FROM if abs(number) >= least), 1.0)


def _by_file(sources: Sources, oldest: float, limit: int | None) -> list[Record | Skipped]:
    """Whole files from the newest backwards, as many as are needed; of the last one the rows at its end."""
    parts: list[list[Record | Skipped]] = []
    missing = limit
    for file in sorted(sources.files, key=lambda file: (file.modified, file.url), reverse=True):
        if file.modified < oldest or missing == 0:
            break
        part = list(read_file(file.url, file.source, file.prefix))
        part = part if missing is None else part[_start_of_last(part, missing) :]
        missing = None if missing is None else missing - _records(part)
        parts.append(part)
    return [item for part in reversed(parts) for item in part]


def _start_of_last(items: list[Record | Skipped], number: int) -> int:
    """Where the last `number` usable conversations begin."""
    places = [i for i, item in enumerate(items) if isinstance(item, Record)]
    return places[-number] if len(places) > number else 0


def _records(items: Iterable[Record | Skipped]) -> int:
    return sum(isinstance(item, Record) for item in items)


def _by_field(sources: Sources, oldest: float, limit: int | None, field: str) -> Iterator[Record | Skipped]:
    """Every row has its own time; those without one are told."""
    order, dated = count(), []
    for row, source, prefix in _rows(sources):
        seconds = seconds_of(_at(row.value, field))
        item = conversation(row, source, prefix)
        if seconds is None:
            yield Skipped(item.id, source, f"no time in the field {field}")
        elif seconds >= oldest and isinstance(item, Record):
            dated.append((seconds, next(order), item))
        elif seconds >= oldest:
            yield item
        if limit is not None and len(dated) > 2 * limit + 1000:
            dated = heapq.nlargest(limit, dated, key=_age)
    if limit is not None:
        dated = heapq.nlargest(limit, dated, key=_age)
    yield from (item for _, _, item in sorted(dated, key=_age))


def _age(dated: tuple[float, int, Record]) -> tuple[float, int]:
    return dated[:2]


def _rows(sources: Sources) -> Iterator[tuple[Row, str, str]]:
    for file in sources.files:
        yield from ((row, file.source, file.prefix) for row in rows_of(file.url))
    for dataset in sources.datasets:
        rows = dataset_rows(dataset.name, _revision(dataset))
        yield from ((row, dataset.source, dataset.prefix) for row in rows)


def _at(value: Any, field: str) -> Any:
    """A field of a row, one inside another as OUTER.INNER."""
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _files(entry: str, source: str) -> Iterator[File]:
    """The files an entry names, in the order of their names."""
    with named_failures(entry, "listed"):
        fs, path = fsspec.core.url_to_fs(entry)
        fs.invalidate_cache()  # a worker lives for weeks, and what it listed once has grown since
        if not PATTERN & set(entry) and not entry.endswith("/") and fs.isfile(path):
            yield _file(fs, path, fs.info(path), source, source)
            return
        found = _listed(fs, path)
    if not found:
        raise _nothing(entry)
    names = _relative_names(sorted(found), _root(path))
    for place, name in names.items():
        yield _file(fs, place, found[place], source, f"{source}/{name}")


def _relative_names(places: list[str], root: str) -> dict[str, str]:
    """What each file is called inside its folder: without its endings, unless two would then be called alike."""
    inside = {place: place.removeprefix(root).strip("/") if place.startswith(root) else place for place in places}
    short = {place: _without_format(name) for place, name in inside.items()}
    counts = Counter(short.values())
    return {place: name if counts[name] == 1 else inside[place] for place, name in short.items()}


def _without_format(name: str) -> str:
    plain = plain_name(name)
    return next((plain.removesuffix(ending) for ending in FORMATS if plain.endswith(ending)), plain)


def _nothing(entry: str) -> BadInput:
    is_file = entry.endswith((*FORMATS, *COMPRESSIONS)) and not Path(entry).is_dir()
    what = "no such file" if is_file else "no file of conversations there"
    return BadInput(f"{entry}: {what}; check prompts.files")


def _listed(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """Files below a folder or matching a pattern, but empty ones; a pattern that matches folders stands for what they
    hold."""
    folder = {path: {"type": "directory"}} if fs.isdir(path) else {}
    matched = fs.glob(path.rstrip("/"), detail=True) if PATTERN & set(path) else folder
    found = {place: info for place, info in matched.items() if info["type"] == "file"}
    for place, info in matched.items():
        if info["type"] == "directory":
            inside = fs.find(place.rstrip("/"), detail=True)
            found |= {name: info for name, info in inside.items() if is_readable(name.removeprefix(place.rstrip("/")))}
    return {place: info for place, info in found.items() if info["size"] != 0}  # a quiet day's log is nothing new


def _file(fs: Any, path: str, info: dict[str, Any], source: str, prefix: str) -> File:
    modified = next((info[key] for key in ("mtime", "LastModified", "last_modified", "updated") if info.get(key)), None)
    if isinstance(fs, LocalFileSystem):
        return File(path, source, prefix, seconds_of(modified) or 0.0, sha256_of(Path(path)))
    url = fs.unstrip_protocol(path)
    return File(url, source, prefix, seconds_of(modified) or 0.0, _remote_content(fs, path, url, info))


def _remote_content(fs: Any, path: str, url: str, info: dict[str, Any]) -> str:
    if not url.startswith(("http://", "https://")):
        tag = next((info[key] for key in CONTENT_TAGS if info.get(key)), None)
        return str(tag).strip('"') if tag else fs.ukey(path)  # the latter also changes with time and storage class
    with fs.open(path, "rb", block_size=0) as file:  # whose tag is no more than the address: read it
        return hashlib.sha256(file.read()).hexdigest()


def _root(path: str) -> str:
    """The part of a path before its first pattern, up to a slash."""
    first = min((i for i, letter in enumerate(path) if letter in PATTERN), default=len(path))
    return path[:first].rpartition("/")[0] if first < len(path) else path


def _name(entry: str) -> str:
    """What the conversations of an entry are called: a file's or folder's name, of the folder before a pattern else."""
    name = PurePosixPath(_root(entry.rstrip("/")) or entry).name
    return name.split(".")[0] or "files"


def _source_of(dataset: str) -> str:
    return PurePosixPath(split_name(dataset)[0]).name


def _dataset(name: str, prefix: str) -> Dataset:
    path, revision, _ = split_name(name)
    if Path(path).exists():
        files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
        content = digest_of([[str(file.relative_to(path)), sha256_of(file)] for file in files])
        return Dataset(name, prefix, content, True)
    try:
        from huggingface_hub import HfApi

        found = HfApi().dataset_info(path, revision=revision).sha
    except (OSError, ValueError) as error:  # not found, gated, no connection, the hub switched off
        raise BadInput(f"cannot open the dataset {name}: {error}") from error
    return Dataset(name, prefix, str(found), False)


def _revision(dataset: Dataset) -> str | None:
    return None if dataset.is_local else dataset.revision
