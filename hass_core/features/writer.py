"""Write one feature shard: rows are collected into row groups of a set size and streamed to a local file."""

from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from hass_core.features.encoding import checksum, encode
from hass_core.features.schema import FeatureInfo


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
        self._rows: list[dict] = []
        self._pending_bytes = 0
        self.num_rows = 0

    def add(self, name: str, split: str, token_ids: list[int], loss_mask: list[int], features: Tensor) -> None:
        """Append one conversation: L token ids, L mask flags, features [L, H]."""
        if not len(token_ids) == len(loss_mask) == len(features):
            raise ValueError(f"{name}: {len(token_ids)} tokens, {len(loss_mask)} flags, {len(features)} features")
        data = encode(features, self._info.encoding)
        row = {"id": name, "split": split, "num_tokens": len(token_ids), "token_ids": token_ids}
        self._rows.append(row | {"loss_mask": loss_mask, "checksum": checksum(data), "features": data})
        self._pending_bytes += len(data)
        self.num_rows += 1
        if self._pending_bytes >= self._row_group_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, self._schema), row_group_size=len(self._rows))
        self._rows, self._pending_bytes = [], 0

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._file.close()
