"""Write one feature shard: rows are collected into row groups of a set size and streamed to a local file.

A row group holds rows of one split, so that validation reads its few rows and nothing else.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from hass_core.features.encoding import checksum, encode
from hass_core.features.lists import Numbers, to_lists
from hass_core.features.schema import FeatureInfo


class _Row(NamedTuple):
    id: str
    split: str
    token_ids: Numbers
    loss_mask: Numbers
    checksum: int
    features: bytes | memoryview


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
        self._pending: dict[str, list[_Row]] = {}
        self._space = np.empty(0, np.uint8)  # of one row group's features; new memory would cost more than filling it
        self.num_rows = 0

    def add(self, name: str, split: str, token_ids: Numbers, loss_mask: Numbers, features: Tensor) -> None:
        """Append one conversation: L token ids, L mask flags, features [L, H]."""
        if not len(token_ids) == len(loss_mask) == len(features):
            raise ValueError(f"{name}: {len(token_ids)} tokens, {len(loss_mask)} flags, {len(features)} features")
        data = encode(features, self._info.encoding)
        rows = self._pending.setdefault(split, [])
        rows.append(_Row(name, split, token_ids, loss_mask, checksum(data), data))
        self.num_rows += 1
        if sum(len(row.features) for row in rows) >= self._row_group_bytes:
            self._flush(split)

    def _flush(self, split: str) -> None:
        rows = self._pending.pop(split)
        size = sum(len(row.features) for row in rows)
        if len(self._space) < size:
            self._space = np.empty(size, np.uint8)
        self._file.write_table(_table(rows, self._schema, self._space), row_group_size=len(rows))

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for split in list(self._pending):
                self._flush(split)
        self._file.close()


def _table(rows: list[_Row], schema: pa.Schema, space: np.ndarray) -> pa.Table:
    """The rows as columns, their features in `space`. Lists and bytes are laid end to end, so that no element becomes
    an object of Python's."""
    lengths = [len(row.token_ids) for row in rows]
    columns = {
        "id": [row.id for row in rows],
        "split": [row.split for row in rows],
        "num_tokens": lengths,
        "token_ids": to_lists([row.token_ids for row in rows], np.int32),
        "loss_mask": to_lists([row.loss_mask for row in rows], np.uint8),
        "checksum": [row.checksum for row in rows],
        "features": _joined([row.features for row in rows], space),
    }
    arrays = (pa.array(c, schema.field(name).type) if isinstance(c, list) else c for name, c in columns.items())
    return pa.Table.from_arrays(list(arrays), schema=schema)


def _joined(parts: list[bytes | memoryview], whole: np.ndarray) -> pa.LargeBinaryArray:
    offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    for part, start, end in zip(parts, offsets[:-1], offsets[1:], strict=True):
        whole[start:end] = np.frombuffer(part, np.uint8)
    return pa.Array.from_buffers(
        pa.large_binary(), len(parts), [None, pa.py_buffer(offsets), pa.py_buffer(whole[: offsets[-1]])]
    )
