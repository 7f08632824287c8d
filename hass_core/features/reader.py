"""Read a features stage as a map-style dataset: random access by conversation, whole row groups at a time.

The order is that of the files and their rows. Lengths are known without touching any features, so packs can be planned
first. Each row is checked when it is read; a bad one is named and never trained on.
"""

import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hass_core.errors import CorruptFile, DraftMismatch
from hass_core.features.encoding import decode
from hass_core.features.schema import FeatureInfo
from hass_core.store import Artifact, StageFolder, Store

CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Conversation:
    """One row. L tokens, H hidden size."""

    id: str
    token_ids: Tensor  # [L] int64
    loss_mask: Tensor  # [L] bool
    features: Tensor  # [L, H] bfloat16


class _Place(NamedTuple):
    file: str
    row_group: int
    row: int


class FeatureDataset:
    """The conversations of one split ("train" or "validation"; None = all).

    Raises DraftMismatch when the features are another target's, CorruptFile when a file is broken.
    """

    def __init__(
        self,
        store: Store,
        artifact: Artifact,
        split: str | None = None,
        target_fingerprint: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        self._folder = store.open(artifact)
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._group_bytes, self._cache_bytes = 0, cache_bytes
        self._files: dict[str, pq.ParquetFile] = {}
        self._places: list[_Place] = []
        lengths: list[int] = []
        infos: set[FeatureInfo] = set()
        for name in shard_names(self._folder):
            file = self._open(name)
            infos.add(_info(file, self._folder, name))
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["num_tokens", "split"])
                chosen = [i for i, s in enumerate(table["split"].to_pylist()) if split is None or s == split]
                self._places += [_Place(name, group, i) for i in chosen]
                lengths += table["num_tokens"].take(pa.array(chosen, pa.int64())).to_pylist()
        if len(infos) != 1:
            raise CorruptFile(f"the shards of {self._folder.url} disagree about their target or encoding: {infos}")
        self.info = infos.pop()
        self.lengths = np.array(lengths, dtype=np.int64)
        if target_fingerprint not in (None, self.info.target_fingerprint):
            raise DraftMismatch(
                f"the features in {self._folder.url} are of the target {self.info.target_fingerprint}, "
                f"this target is {target_fingerprint}; extract features with this target"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Conversation:
        place = self._places[index]
        table = self._row_group(place.file, place.row_group)
        row = {name: table[name][place.row] for name in ("id", "num_tokens", "token_ids", "loss_mask", "crc32")}
        where = f"{self._folder.url}/{place.file}, row group {place.row_group}, row {place.row} ({row['id']})"
        data = table["features"][place.row].as_buffer()
        if zlib.crc32(data) != row["crc32"].as_py():
            raise CorruptFile(f"{where}: the checksum of the features differs; remove the stage and extract again")
        try:
            features = decode(data, row["num_tokens"].as_py(), self.info.hidden_size, self.info.encoding)
        except (ValueError, OSError) as error:
            raise CorruptFile(f"{where}: {error}; remove the stage and extract again") from error
        conversation = Conversation(
            id=row["id"].as_py(),
            token_ids=_tensor(row["token_ids"], torch.int64),
            loss_mask=_tensor(row["loss_mask"], torch.bool),
            features=features,
        )
        check(conversation, where)
        return conversation

    def _open(self, name: str) -> pq.ParquetFile:
        if name not in self._files:
            path = self._folder.local_path(name, rows_checked=True)
            try:
                self._files[name] = pq.ParquetFile(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise CorruptFile(f"{path} is not a readable Parquet file: {error}; extract again") from error
        return self._files[name]

    def _row_group(self, name: str, number: int) -> pa.Table:
        """One row group with all columns, from a cache that forgets the least recently used."""
        if (name, number) in self._groups:
            self._groups.move_to_end((name, number))
            return self._groups[name, number]
        try:
            table = self._open(name).read_row_group(number)
        except (pa.ArrowInvalid, OSError) as error:
            raise CorruptFile(f"{self._folder.url}/{name}, row group {number}: {error}; extract again") from error
        self._groups[name, number] = table
        self._group_bytes += table.nbytes
        while self._group_bytes > self._cache_bytes and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._group_bytes -= oldest.nbytes
        return table


def check(conversation: Conversation, where: str) -> None:
    """Refuse a row whose parts disagree or are not finite. Raises CorruptFile naming `where`."""
    lengths = {len(conversation.token_ids), len(conversation.loss_mask), len(conversation.features)}
    if len(lengths) != 1:
        raise CorruptFile(f"{where}: token ids, loss mask and features have the lengths {sorted(lengths)}")
    if not conversation.loss_mask.any():
        raise CorruptFile(f"{where}: no token is supervised")
    # a bfloat16 is NaN or infinite when all its exponent bits are set; integers are compared faster than floats
    exponents = conversation.features.view(torch.int16) & 0x7F80
    if bool((exponents == 0x7F80).any()):
        raise CorruptFile(f"{where}: the features hold NaN or infinite values; extract again, in another dtype")


def shard_names(folder: StageFolder) -> list[str]:
    """The feature shards of a finished stage, in order."""
    manifest = folder.manifest()
    assert manifest is not None
    return sorted(name for name in manifest.files if name.startswith("part-"))


def _info(file: pq.ParquetFile, folder: StageFolder, name: str) -> FeatureInfo:
    try:
        return FeatureInfo.of(file.schema_arrow)
    except KeyError:
        raise CorruptFile(f"{folder.url}/{name} is no feature shard: its schema says nothing of a target") from None


def _tensor(values: pa.ListScalar, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values.values.to_numpy(zero_copy_only=False).copy()).to(dtype)
