"""Row groups of a features stage in a remote store: each fetched once, in pieces at the same time, and kept.

A pass wants row groups from everywhere in the data; whole files would come long before they are used. A local copy is a
sparse file in which the row group lies where it lies in its shard, so that a Parquet reader with the shard's footer
finds it there. Behind it stand the four bytes of its checksum: a copy that an earlier process left is checked by them.
"""

import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from hass_core.errors import CorruptFile
from hass_core.features.encoding import checksum
from hass_core.store import StageFolder, Store

PIECE_BYTES, PIECES_AT_ONCE = 8 << 20, 16  # one connection to S3 brings some 100 MB/s
MARK_BYTES = 4

ReadRange = Callable[[int, int], "bytes | pa.Buffer"]
"""The bytes of a file from a place to another."""


class RemoteGroups:
    """Local copies of a stage's row groups, in the store's cache. May be used by several threads."""

    def __init__(self, folder: StageFolder):
        self._folder, self._cache = folder, folder.store.files
        self._threads = ThreadPoolExecutor(PIECES_AT_ONCE, "fetch")
        self._opened = cache(partial(open_remote, folder.store))
        self._known: set[str] = set()

    def path(self, name: str, footer: pq.FileMetaData, number: int) -> Path:
        """A file that holds row group `number` of a shard at its place. Raises StoreError, CorruptFile."""
        start, end = extent(footer, number)
        key = f"{self._folder.stage}/{self._folder.digest}/{name}.{number}"
        fetch = partial(self._fetch, key, name, start, end)
        with self._folder.store.named_failures("read from"):
            path = self._cache.get(key, None, fetch)
            if key not in self._known and not _is_whole(path, start, end):
                path.unlink()
                path = self._cache.get(key, None, fetch)
        self._known.add(key)
        return path

    def _fetch(self, key: str, name: str, start: int, end: int, path: Path) -> None:
        url = f"{self._folder.url}/{name}"
        try:
            read = self._opened(url)
            with path.open("wb", buffering=0) as file:
                pieces = self._threads.map(partial(_copy_piece, read, file.fileno()), *pieces_of(start, end))
                os.pwrite(file.fileno(), mark(pieces), end)
        except FileNotFoundError:
            raise CorruptFile(f"{url}: missing; remove {self._folder.url} and extract again") from None
        except EOFError:
            raise CorruptFile(f"{url}: truncated; remove {self._folder.url} and extract again") from None
        self._known.add(key)


def pieces_of(start: int, end: int) -> tuple[list[int], list[int]]:
    """Where the pieces of a range begin, and where they end."""
    borders = [*range(start, end, PIECE_BYTES), end]
    return borders[:-1], borders[1:]


def mark(checksums: Iterable[int]) -> bytes:
    """Four bytes from the checksums of all pieces."""
    return zlib.crc32(np.fromiter(checksums, np.uint32).tobytes()).to_bytes(MARK_BYTES, "little")


def _copy_piece(read: ReadRange, handle: int, start: int, end: int) -> int:
    """Put a piece in place; its checksum."""
    data = read(start, end)
    if len(data) != end - start:
        raise EOFError
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, start)
        view, start = view[written:], start + written
    return checksum(data)


def extent(footer: pq.FileMetaData, number: int) -> tuple[int, int]:
    """Where a row group begins in its file, and where it ends."""
    group = footer.row_group(number)
    columns = [group.column(i) for i in range(group.num_columns)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    ends = (start + column.total_compressed_size for start, column in zip(starts, columns, strict=True))
    return min(starts), max(ends)


def open_remote(store: Store, url: str) -> ReadRange:
    """How to read ranges of a remote file. For S3 by Arrow's client: it leaves Python alone and is some three
    times as fast."""
    if not store.is_s3:
        path = store.fs._strip_protocol(url)
        return lambda start, end: store.fs.cat_file(path, start=start, end=end)
    file = _arrow_s3(store).open_input_file(url.removeprefix("s3://"))
    return lambda start, end: file.read_at(end - start, start)


def _arrow_s3(store: Store) -> pyarrow.fs.S3FileSystem:
    """Arrow's client for the server that the store's client found. Credentials come from the environment, as there."""
    meta = store.fs.s3.meta
    scheme, _, server = meta.endpoint_url.partition("://")
    settings: dict[str, Any] = {"scheme": scheme, "region": meta.region_name}
    if not server.endswith(".amazonaws.com"):  # Arrow knows Amazon's by the region
        settings["endpoint_override"] = server
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        settings["tls_ca_file_path"] = bundle
    return pyarrow.fs.S3FileSystem(**settings)


def _is_whole(path: Path, start: int, end: int) -> bool:
    """Whether an earlier process's copy is what it was: such a process may have been killed, or the machine."""
    if path.stat().st_size != end + MARK_BYTES:
        return False
    with pa.memory_map(str(path)) as file:
        sums = (checksum(file.read_at(last - first, first)) for first, last in zip(*pieces_of(start, end), strict=True))
        return mark(sums) == file.read_at(MARK_BYTES, end)
