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
from datetime import UTC, datetime
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from hass_core.config import PromptsConfig
from hass_core.data.conversations import Record
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

FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zstd")
PATTERN = set("*?[")
SECONDS_A_DAY = 86_400.0
MILLISECONDS_FROM = 1e11  # numbers above are no seconds: they would lie beyond the year 5000


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
    revision: str
    is_local: bool


@dataclass(frozen=True)
class Sources:
    """All that the settings name, resolved."""

    files: tuple[File, ...]
    datasets: tuple[Dataset, ...]

    def key(self) -> dict[str, Any]:
        """What decides the conversations read from here."""
        return {
            "files": [[file.source, file.prefix, file.content] for file in self.files],
            "datasets": [[dataset.name, dataset.revision] for dataset in self.datasets],
        }


def resolve(config: PromptsConfig) -> Sources:
    """Look up files and revisions. Raises BadInput for one that is not there."""
    names = Counter(_name(entry) for entry in config.files)
    files: dict[str, File] = {}
    for number, entry in enumerate(config.files, start=1):
        name = _name(entry)
        for file in _files(entry, name if names[name] == 1 else f"{name}-{number}"):
            files.setdefault(file.url, file)
    return Sources(tuple(files.values()), tuple(map(_dataset, config.datasets)))


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
        yield from read_dataset(dataset.name, _revision(dataset))


def newest_of(sources: Sources, config: PromptsConfig, now: datetime | None = None) -> list[Record | Skipped]:
    """The conversations inside the window of the settings, the oldest first. Raises BadInput."""
    oldest = -float("inf")
    if config.last_days is not None:
        oldest = (now or datetime.now(UTC)).timestamp() - config.last_days * SECONDS_A_DAY
    if config.time_field is None:
        return _by_file(sources, oldest, config.newest)
    return list(unique(_by_field(sources, oldest, config.newest, config.time_field)))


def seconds_of(value: Any) -> float | None:
    """Seconds since 1970 of a time as logs write it: a number of seconds or milliseconds, or ISO 8601; else None."""
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
    if not abs(number) < 1e18:
        return None
    return number / 1000 if abs(number) >= MILLISECONDS_FROM else number


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
        name = PurePosixPath(split_name(dataset.name)[0]).name
        yield from ((row, name, name) for row in dataset_rows(dataset.name, _revision(dataset)))


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
    root = _root(path)
    for place, info in sorted(found.items()):
        relative = place.removeprefix(root).strip("/").partition(".")[0] if place.startswith(root) else place
        yield _file(fs, place, info, source, f"{source}/{relative}")


def _nothing(entry: str) -> BadInput:
    what = "no such file" if entry.endswith((*FORMATS, *COMPRESSIONS)) else "no file of conversations there"
    return BadInput(f"{entry}: {what}; check prompts.files")


def _listed(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """Files below a folder or matching a pattern; a pattern that matches folders stands for what they hold."""
    folder = {path: {"type": "directory"}} if fs.isdir(path) else {}
    matched = fs.glob(path.rstrip("/"), detail=True) if PATTERN & set(path) else folder
    found = {place: info for place, info in matched.items() if info["type"] == "file"}
    for place, info in matched.items():
        if info["type"] == "directory":
            inside = fs.find(place.rstrip("/"), detail=True)
            found |= {name: info for name, info in inside.items() if _is_readable(name.removeprefix(place.rstrip("/")))}
    return found


def _is_readable(relative: str) -> bool:
    """Whether a name in a folder is one of conversations; what begins with a dot or underline is someone's mark."""
    parts = PurePosixPath(relative.strip("/")).parts
    name = relative
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return name.endswith(FORMATS) and not any(part.startswith((".", "_")) for part in parts)


def _file(fs: Any, path: str, info: dict[str, Any], source: str, prefix: str) -> File:
    modified = next((info[key] for key in ("mtime", "LastModified", "last_modified", "updated") if info.get(key)), None)
    if isinstance(fs, LocalFileSystem):
        return File(path, source, prefix, seconds_of(modified) or 0.0, sha256_of(Path(path)))
    url = fs.unstrip_protocol(path)
    return File(url, source, prefix, seconds_of(modified) or 0.0, _remote_content(fs, path, url))


def _remote_content(fs: Any, path: str, url: str) -> str:
    if not url.startswith(("http://", "https://")):
        return fs.ukey(path)
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


def _dataset(name: str) -> Dataset:
    path, revision, _ = split_name(name)
    if Path(path).exists():
        files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
        return Dataset(name, digest_of([[str(file.relative_to(path)), sha256_of(file)] for file in files]), True)
    try:
        from huggingface_hub import HfApi

        found = HfApi().dataset_info(path, revision=revision).sha
    except (OSError, ValueError) as error:  # not found, gated, no connection, the hub switched off
        raise BadInput(f"cannot open the dataset {name}: {error}") from error
    return Dataset(name, str(found), False)


def _revision(dataset: Dataset) -> str | None:
    return None if dataset.is_local else dataset.revision
