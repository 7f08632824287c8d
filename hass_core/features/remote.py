"""Row groups of a features stage in a remote store: fetched by range, and kept in the store's local cache.

A pass wants row groups from everywhere in the data; whole files would come long before they are used. Arrow's own S3
client fetches and decodes a row group in one call, without Python's lock. A copy is written behind by a thread of its
own, as an Arrow file that is mapped into memory later; where the disk is slower than the network some go without.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from hass_core.errors import CorruptFile
from hass_core.store import StageFolder, Store

MOST_UNWRITTEN = 8  # row groups that wait to be written, in memory


class RemoteGroups:
    """The row groups of a remote stage. May be used by several threads."""

    def __init__(self, folder: StageFolder):
        self._folder, self._cache = folder, folder.store.files
        self._opened = cache(partial(open_remote, folder.store))
        self._writer = ThreadPoolExecutor(1, "copies")
        self._room = threading.BoundedSemaphore(MOST_UNWRITTEN)

    def read(self, name: str, footer: pq.FileMetaData, number: int) -> pa.Table:
        """Row group `number` of a shard with that footer. Raises StoreError, CorruptFile."""
        key = self._key(name, number)
        if path := self._cache.existing(key):
            with suppress(FileNotFoundError, pa.ArrowInvalid):  # another process made room; no whole file
                return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        with self._folder.store.named_failures("read from"):
            table = self._fetched(f"{self._folder.url}/{name}", footer, number)
        if self._room.acquire(blocking=False):
            with suppress(RuntimeError):  # finished
                self._writer.submit(self._keep, key, table)
        return table

    def forget(self, name: str, number: int) -> None:
        """Remove the copy, in which something was found wrong."""
        if path := self._cache.existing(self._key(name, number)):
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Wait for the copies that are being written; no more are."""
        self._writer.shutdown()

    def _key(self, name: str, number: int) -> str:
        return f"{self._folder.stage}/{self._folder.digest}/{name}.{number}.arrow"

    def _fetched(self, url: str, footer: pq.FileMetaData, number: int) -> pa.Table:
        try:
            source = self._opened(url) if self._folder.store.is_s3 else open_remote(self._folder.store, url)
            with pq.ParquetFile(source, metadata=footer, pre_buffer=True) as file:
                return file.read_row_group(number)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise CorruptFile(f"{url}: missing; remove {self._folder.url} and extract again") from None
            if "AWS Error" in str(error) or isinstance(error, TimeoutError | ConnectionError):
                raise
            message = f"{url}, row group {number} is not readable Parquet: {error}; remove the stage and extract again"
            raise CorruptFile(message) from error

    def _keep(self, key: str, table: pa.Table) -> None:
        try:
            self._cache.put(key, partial(_write, table))
        except OSError:  # a full disk, say: the data is there all the same
            pass
        finally:
            self._room.release()


def open_remote(store: Store, url: str) -> Any:
    """A remote file for random access; for S3 one that several threads may read at once, without Python's lock."""
    if store.is_s3:
        return _arrow_s3(store).open_input_file(url.removeprefix("s3://"))
    return store.fs.open(url, "rb")


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


def _write(table: pa.Table, path: Path) -> None:
    """On disk when it returns, or a crash of the machine could leave a file with holes."""
    with path.open("wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())
