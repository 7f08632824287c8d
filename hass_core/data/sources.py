"""Read conversations from files and datasets, row by row.

Files are JSONL, JSON (a list, or an object that holds one), compressed or not, or Parquet, local or on any fsspec
address. A dataset is a name or folder for `datasets.load_dataset`, streamed. A broken row stops the reading with the
file and the row's number; an unusable conversation is yielded as Skipped.
"""

import codecs
import io
import json
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from hass_core.data.conversations import FORM_KEYS, Record, is_conversation, parse_row
from hass_core.data.file_names import plain_name
from hass_core.data.messages import BrokenRow, Unusable
from hass_core.errors import BadInput, HassError

LISTS = ("data", "rows", "train", "examples", "items", "dataset")  # keys under which a file holds its rows
OTHER_FORMATS = (".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xlsx", ".xls", ".tar", ".tgz", ".npz", ".pkl")
EXCERPT = 20  # characters shown on either side of a fault: enough to see it, too few to give a text away
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Skipped:
    """A conversation left out, and why."""

    id: str
    source: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A row as a file holds it: its place in words, its number there, and its value."""

    where: str
    number: int
    value: Any


def read_file(path: str | Path, source: str | None = None, prefix: str | None = None) -> Iterator[Record | Skipped]:
    """All conversations of one file; `source` names it (default: the file's name up to the first dot).

    `prefix` begins their ids (default: the source).

    Raises BadInput naming file and line (or row) of the first broken record.
    """
    source = source or PurePosixPath(str(path)).name.split(".")[0]
    return unique(conversation(row, source, prefix) for row in rows_of(path))


def read_dataset(name: str, revision: str | None = None, prefix: str | None = None) -> Iterator[Record | Skipped]:
    """Conversations of a dataset given as NAME or NAME:SPLIT (default split: train), streamed.

    `prefix` begins their ids (default: the dataset's name).

    Raises BadInput when the dataset cannot be opened or a row has no known form.
    """
    source = PurePosixPath(split_name(name)[0]).name
    return unique(conversation(row, source, prefix) for row in dataset_rows(name, revision))


def conversation(row: Row, source: str, prefix: str | None = None) -> Record | Skipped:
    """A row as a conversation; `prefix` begins its id (default: its source). Raises BadInput when it is broken."""
    prefix = prefix or source
    try:
        return replace(parse_row(row.value, prefix, row.number), source=source)
    except BrokenRow as problem:
        raise BadInput(f"{row.where}: {problem}") from None
    except Unusable as problem:
        return Skipped(f"{prefix}/{row.number}", source, str(problem))  # its number finds it, whatever its id


def rows_of(path: str | Path) -> Iterator[Row]:
    """All rows of one file. Raises BadInput naming what is missing, damaged or no JSON."""
    _check_format(str(path))
    with named_failures(str(path), "read"):
        yield from _parquet_rows(str(path)) if str(path).endswith(".parquet") else _json_rows(str(path))


def _check_format(path: str) -> None:
    name = plain_name(path)
    if name.lower().endswith(OTHER_FORMATS):
        ending = PurePosixPath(name).suffix
        raise BadInput(f"{path}: {ending} files are not read; convert it to JSON lines (.jsonl) or Parquet (.parquet)")


@contextmanager
def named_failures(path: str, what: str) -> Iterator[None]:
    """Turn a failure to read or list a path into a BadInput; remote file systems have errors of their own."""
    try:
        yield
    except HassError:
        raise
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; check prompts.files") from None
    except Exception as error:
        if "://" not in path and not isinstance(error, DAMAGED):
            raise
        advice = "; check the address, its credentials and AWS_ENDPOINT_URL" if "://" in path else ""
        raise BadInput(f"{path}: cannot be {what}: {error or type(error).__name__}{advice}") from error


def split_name(name: str) -> tuple[str, str | None, str]:
    """Path, revision and split of a dataset given as NAME, NAME:SPLIT, NAME@REVISION or NAME@REVISION:SPLIT."""
    if Path(name).exists():
        return name, None, "train"
    path, _, split = name.partition(":")
    path, _, revision = (path, "", "") if Path(path).exists() else path.partition("@")
    return path, revision or None, split or "train"


def dataset_rows(name: str, revision: str | None = None) -> Iterator[Row]:
    """All rows of a dataset, streamed. Raises BadInput."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput(f"reading the dataset {name} needs the package datasets: pip install datasets") from None
    path, named, split = split_name(name)
    try:
        rows = load_dataset(path, split=split, revision=revision or named, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield Row(f"dataset {name}, row {number}", number, row)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no such split, no connection
        raise BadInput(f"cannot open the dataset {name}: {error}") from error


def unique(items: Iterable[Record | Skipped]) -> Iterator[Record | Skipped]:
    """Two conversations with one id would overwrite each other later: the second is skipped.

    A row that is skipped has its number for an id, which may well be the id that another row gives itself.
    """
    seen: set[str] = set()
    for item in items:
        if isinstance(item, Skipped):
            yield item
            continue
        yield Skipped(item.id, item.source, "id used twice") if item.id in seen else item
        seen.add(item.id)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A file for reading, decompressed by its name."""
    packed = path.endswith((".zst", ".zstd"))
    with fsspec.open(path, "rb", compression=None if packed else "infer") as file:
        if packed:
            yield cast(BinaryIO, io.BufferedReader(cast(Any, pa.CompressedInputStream(file, "zstd"))))
        else:
            yield cast(BinaryIO, file)


def _json_rows(path: str) -> Iterator[Row]:
    """JSON lines; or, when the first line is no JSON value or the only one, the values of the whole text."""
    with _opened(path) as file:
        lines = _lines(file)
        first = next(lines, None)
        if first is None:
            return
        second = next(lines, None)
        if second is None or not _is_json(first[1]):
            yield from _document(_rejoined([first, *([second] if second else []), *lines]), path)
            return
        for number, line in chain([first, second], lines):
            yield Row(f"{path}, line {number}", number, _decoded(line, path, number))


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, without the mark of the byte order."""
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield number, line


def _rejoined(lines: list[tuple[int, bytes]]) -> bytes:
    """The text that numbered lines came from, each in its place."""
    places = zip([0, *(number for number, _ in lines)], lines, strict=False)
    return b"".join(b"\n" * (number - before - 1) + line for before, (number, line) in places)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _document(text: bytes, path: str) -> Iterator[Row]:
    """The rows of a whole text: one JSON value, or several one behind the other."""
    decoder, words, number = json.JSONDecoder(), _text(text, path, 0), 0
    start = _next_word(words, 0)
    line = 1 + words.count("\n", 0, start)
    while start < len(words):
        try:
            value, stop = decoder.raw_decode(words, start)
        except (ValueError, RecursionError) as error:
            raise _no_json(error, path, 1) from None
        for row in _listed(value):
            number += 1
            place = f"line {line}" if row is value else f"record {number}"  # where it begins, or which of a list
            yield Row(f"{path}, {place}", number, row)
        following = _next_word(words, stop)
        line += words.count("\n", start, following)
        start = following


def _next_word(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _listed(value: Any) -> list[Any]:
    """The rows in a JSON value: a list's items, those of the list an object holds, or the value itself."""
    if isinstance(value, dict):
        held = [value[key] for key in LISTS if isinstance(value.get(key), list) and value.keys().isdisjoint(FORM_KEYS)]
        return held[0] if len(held) == 1 else [value]
    if isinstance(value, list) and not is_conversation(value):
        return value
    return [value]


def _decoded(line: bytes, path: str, number: int) -> Any:
    """The JSON value of a line. Raises BadInput."""
    try:
        return json.loads(_text(line, path, number).rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        raise _no_json(error, path, number) from None


def _text(data: bytes, path: str, number: int) -> str:
    """`number`: the line, 0 = a whole file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = number or data.count(b"\n", 0, error.start) + 1
        before = data[data.rfind(b"\n", 0, error.start) + 1 : error.start].decode(errors="replace")
        place = f"{path}, line {line}, column {len(before) + 1}"
        raise BadInput(f"{place}: not valid UTF-8 behind {before[-EXCERPT:]!r}; save the file as UTF-8") from None


def _no_json(error: Exception, path: str, line: int) -> BadInput:
    """`line`: the number of the error's first line, where its text is one of a file's lines."""
    if not isinstance(error, json.JSONDecodeError):
        what = "nested too deep" if isinstance(error, RecursionError) else str(error)
        return BadInput(f"{path}, line {line}: not valid JSON: {what}; correct the line")
    text, what = error.doc.rstrip(), error.msg.removesuffix(" starting at").removesuffix(" at").lower()
    at = min(error.pos, len(text))  # what ends too early does so behind its last character, not in a line after it
    start, found = text.rfind("\n", 0, at) + 1, text[at:].split("\n", 1)[0]
    where = f"at {found[:EXCERPT]!r}" if found else "at the end of the line"
    behind = f", behind {text[max(start, at - EXCERPT) : at]!r}" if at > start else ""
    place = f"{path}, line {line + text.count(chr(10), 0, at)}, column {at - start + 1}"
    return BadInput(f"{place}: not valid JSON {where}{behind}: {what}; correct the line")


def _parquet_rows(path: str) -> Iterator[Row]:
    number = 0
    try:
        with fsspec.open(path, "rb") as file:
            table = pq.ParquetFile(file)
            if twice := [name for name, count in Counter(table.schema_arrow.names).items() if count > 1]:
                raise BadInput(f"{path}: two columns are called {twice[0]}; rename one of them")
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", number, value)
    except (pa.ArrowException, ValueError, OverflowError) as error:  # text that is no UTF-8, times beyond the calendar
        place = f" behind row {number}" if number else ""
        raise BadInput(f"{path}: not a readable Parquet file{place}: {error}") from error
