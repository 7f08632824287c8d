"""Read conversations from files and datasets, row by row.

Files are JSONL, JSON (a list), either gzipped, or Parquet, local or on any fsspec address. A dataset is a name or
folder for `datasets.load_dataset`, streamed. A broken row stops the reading with the file and the row's number; an
unusable conversation is yielded as Skipped.
"""

import codecs
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from hass_core.data.conversations import BrokenRow, Record, Unusable, parse_row
from hass_core.errors import BadInput


@dataclass(frozen=True)
class Skipped:
    """A conversation left out, and why."""

    id: str
    source: str
    reason: str


def read_file(path: str | Path, source: str | None = None) -> Iterator[Record | Skipped]:
    """All conversations of one file; `source` names it in their ids (default: the file's name up to the first dot).

    Raises BadInput naming file and line (or row) of the first broken record.
    """
    name = PurePosixPath(str(path)).name
    source = source or name.split(".")[0]
    seen: set[str] = set()
    try:
        for number, row in _rows(str(path), name):
            yield _unique(_parsed(row, source, number, f"{path}, {_unit(name)} {number}"), seen)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; check prompts.files") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: a truncated or broken gzip file
        raise BadInput(f"{path}: cannot be read: {error}") from error


def read_dataset(name: str) -> Iterator[Record | Skipped]:
    """Conversations of a dataset given as NAME or NAME:SPLIT (default split: train), streamed.

    Raises BadInput when the dataset cannot be opened or a row has no known form.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput(f"reading the dataset {name} needs the package datasets: pip install datasets") from None
    path, _, split = (name, "", "") if Path(name).exists() else name.partition(":")
    seen: set[str] = set()
    try:
        rows = load_dataset(path, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:  # not found, no such split, no connection
        raise BadInput(f"cannot open the dataset {name}: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield _unique(_parsed(row, PurePosixPath(path).name, number, f"dataset {name}, row {number}"), seen)


def _parsed(row: Any, source: str, number: int, where: str) -> Record | Skipped:
    try:
        return parse_row(row, source, number)
    except BrokenRow as problem:
        raise BadInput(f"{where}: {problem}") from None
    except Unusable as problem:
        return Skipped(f"{source}/{number}", source, str(problem))


def _unique(item: Record | Skipped, seen: set[str]) -> Record | Skipped:
    """Two rows with one id would overwrite each other later: the second is skipped."""
    if item.id in seen:
        return Skipped(item.id, item.source, "id used twice")
    seen.add(item.id)
    return item


def _unit(name: str) -> str:
    return {"parquet": "row", "json": "record"}.get(name.rpartition(".")[2], "line")


def _rows(path: str, name: str) -> Iterator[tuple[int, Any]]:
    if name.endswith(".parquet"):
        return enumerate(_parquet_rows(path), start=1)
    return _json_rows(path)


def _json_rows(path: str) -> Iterator[tuple[int, Any]]:
    """(line number, object) of JSON lines; (position, object) of a JSON list, told by its first character."""
    with cast(BinaryIO, fsspec.open(path, "rb", compression="infer")) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if number == 1 and line.lstrip().startswith(b"["):
                yield from enumerate(_decoded(line + file.read(), path, 0), start=1)
                return
            if line.strip():
                yield number, _decoded(line, path, number)


def _decoded(text: bytes, path: str, number: int) -> Any:
    """The JSON value. Raises BadInput with the line; `number` 0 = the text is a whole file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = number or error.lineno
        raise BadInput(f"{path}, line {line}: not valid JSON: {error.msg}; correct the line") from None
    except UnicodeDecodeError as error:
        line = number or text.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}, line {line}: not valid UTF-8; save the file as UTF-8") from None


def _parquet_rows(path: str) -> Iterator[Any]:
    try:
        with fsspec.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise BadInput(f"{path}: not a readable Parquet file: {error}") from error
