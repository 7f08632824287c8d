"""Write feature shards, in threads while the target computes the next ones.

A shard's rows are collected into row groups of a set size and streamed to a local file. A row group holds rows of one
split, so that validation reads its few rows and nothing else.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from hass_core.features.schema import FeatureInfo, Numbers, checksum, encode, to_lists
from hass_core.features.tokenise import Encoded, Part
from hass_core.store import StageFolder

WRITERS = 6  # parts at once
BATCHES_HELD = 4  # computed but not yet written, of all parts together

Computed = tuple[list[Encoded], Callable[[], list[Tensor]]]  # conversations, and what waits for their features
_Batches = queue.SimpleQueue[Computed | BaseException | None]


class _Row(NamedTuple):
    id: str
    split: str
    token_ids: Numbers
    loss_mask: Numbers
    checksum: int


class _Group:
    """The rows of a row group to come, their features end to end in space of its own.

    They are copied as they come: a row kept as a view would hold its whole batch, in memory that the next batch needs.
    """

    def __init__(self, size: int):
        self._space = np.empty(2 * size, np.uint8)  # the system gives no memory for what is not written to
        self.clear()

    def clear(self) -> None:
        self.rows: list[_Row] = []
        self.ends = [0]

    @property
    def size(self) -> int:
        """Bytes of features."""
        return self.ends[-1]

    def add(self, row: _Row, features: bytes | memoryview) -> None:
        end = self.size + len(features)
        if end > len(self._space):
            grown = np.empty(2 * end, np.uint8)
            grown[: self.size] = self._space[: self.size]
            self._space = grown
        self._space[self.size : end] = np.frombuffer(features, np.uint8)
        self.rows.append(row)
        self.ends.append(end)

    def table(self, schema: pa.Schema) -> pa.Table:
        """The rows as columns; lists are laid end to end, so that no element becomes an object of Python's."""
        columns = {
            "id": [row.id for row in self.rows],
            "split": [row.split for row in self.rows],
            "num_tokens": [len(row.token_ids) for row in self.rows],
            "token_ids": to_lists([row.token_ids for row in self.rows], np.int32),
            "loss_mask": to_lists([row.loss_mask for row in self.rows], np.uint8),
            "checksum": [row.checksum for row in self.rows],
            "features": self._features(),
        }
        arrays = (pa.array(c, schema.field(name).type) if isinstance(c, list) else c for name, c in columns.items())
        return pa.Table.from_arrays(list(arrays), schema=schema)

    def _features(self) -> pa.LargeBinaryArray:
        offsets = np.array(self.ends, np.int64)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self._space[: self.size])]
        return pa.Array.from_buffers(pa.large_binary(), len(self.rows), buffers)


class FeatureWriter:
    """A context manager; leaving it by an exception leaves an unfinished file, which its owner throws away."""

    def __init__(self, path: Path, info: FeatureInfo, row_group_mb: int = 64):
        self._info = info
        self._schema = info.schema()
        self._row_group_bytes = row_group_mb << 20
        # neither dictionary nor statistics: features never repeat, and readers take whole row groups
        options: dict[str, Any] = {
            "compression": {name: "none" if name == "features" else "zstd" for name in self._schema.names},
            "use_dictionary": ["split"],
            "write_statistics": ["id", "num_tokens", "split"],
        }
        self._file = pq.ParquetWriter(path, self._schema, **options)
        self._groups: dict[str, _Group] = {}
        self.num_rows = 0

    def add(self, name: str, split: str, token_ids: Numbers, loss_mask: Numbers, features: Tensor) -> None:
        """Append one conversation: L token ids, L mask flags, features [L, S·H]."""
        if not len(token_ids) == len(loss_mask) == len(features):
            raise ValueError(f"{name}: {len(token_ids)} tokens, {len(loss_mask)} flags, {len(features)} features")
        data = encode(features.reshape(-1, self._info.hidden_size), self._info.encoding)
        if split not in self._groups:
            self._groups[split] = _Group(self._row_group_bytes)
        group = self._groups[split]
        group.add(_Row(name, split, token_ids, loss_mask, checksum(data)), data)
        self.num_rows += 1
        if group.size >= self._row_group_bytes:
            self._flush(group)

    def _flush(self, group: _Group) -> None:
        self._file.write_table(group.table(self._schema), row_group_size=len(group.rows))
        group.clear()

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for group in self._groups.values():
                if group.rows:
                    self._flush(group)
        self._file.close()


class PartsWriter:
    """A context manager; leaving it waits until all parts are in place. After an exception, the unfinished are not."""

    def __init__(self, folder: StageFolder, info: FeatureInfo, row_group_mb: int):
        self._folder, self._info, self._row_group_mb = folder, info, row_group_mb
        self._threads = ThreadPoolExecutor(WRITERS)
        self._room = threading.Semaphore(BATCHES_HELD)
        self._writing: deque[Future[None]] = deque()

    @contextmanager
    def part(self, part: Part) -> Iterator[Callable[[Computed], None]]:
        """Hand a part's batches over one by one. Raises the error of whichever part could not be written."""
        while len(self._writing) >= WRITERS:
            self._writing.popleft().result()
        batches = _Batches()
        self._writing.append(self._threads.submit(self._write, part, batches))

        def hand_over(batch: Computed) -> None:
            self._raise_failure()
            while not self._room.acquire(timeout=0.2):
                self._raise_failure()
            batches.put(batch)

        try:
            yield hand_over
        except BaseException as error:
            batches.put(error)
            raise
        batches.put(None)

    def _write(self, part: Part, batches: _Batches) -> None:
        """Runs in a thread."""
        notes = {"skipped": part.skipped, "tokens": part.tokens, "supervised_tokens": part.supervised_tokens}
        with self._folder.writing(part.name, **notes) as file:
            with FeatureWriter(file.path, self._info, self._row_group_mb) as writer:
                while (item := batches.get()) is not None:
                    if isinstance(item, BaseException):
                        raise item
                    conversations, features_of = item
                    for c, features in zip(conversations, features_of(), strict=True):
                        writer.add(c.id, c.split, c.token_ids, c.loss_mask, features)
                    self._room.release()
            file.rows = writer.num_rows

    def _raise_failure(self) -> None:
        for written in self._writing:
            if written.done():
                written.result()

    def __enter__(self) -> "PartsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait(self._writing)
        self._threads.shutdown()
        if kind is None:
            self._raise_failure()
