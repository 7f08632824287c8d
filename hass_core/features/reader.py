"""Read a features stage as a map-style dataset: random access by conversation, whole row groups at a time.

The order is that of the files and their rows. Opening reads footers and two small columns only, in a remote store by
range, so lengths are known and packs can be planned before any feature is read. Each row is checked the first time it
is read; a bad one is named and never trained on.
"""

import os
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from torch import Tensor

from hass_core.errors import CorruptFile, DraftMismatch
from hass_core.features.remote import RemoteGroups
from hass_core.features.schema import FeatureInfo, checksum, decode
from hass_core.store import Artifact, StageFolder, Store

SMALLEST_CACHE_BYTES = 2 << 30  # what training shuffles together, and what comes next
CACHE_SHARE = 1 / 8  # of the machine's memory
ROW_GROUP_BYTES = 64 << 20  # as the settings have it unless they are changed
OPENING_THREADS, MOST_GROUPS_AHEAD = 8, 4


@dataclass(frozen=True)
class Conversation:
    """One row. L tokens, H hidden size."""

    id: str
    token_ids: Tensor  # [L] int64
    loss_mask: Tensor  # [L] bool
    features: Tensor  # [L, H] bfloat16; for the encoding "bf16" a view of the file's bytes: do not write into it
    taps: Tensor | None = None  # [L, n·H] alike, the states after other layers that the draft reads

    @classmethod
    def of(cls, name: str, token_ids: Tensor, loss_mask: Tensor, states: Tensor, hidden: int) -> "Conversation":
        """From all states [L, S·H] of its tokens."""
        taps = states[:, hidden:] if states.shape[1] > hidden else None
        return cls(name, token_ids, loss_mask, states[:, :hidden], taps)


class Answer(NamedTuple):
    """A conversation's tokens [L] and which of them are the target's [L]."""

    token_ids: Tensor
    loss_mask: Tensor


class _RowAddress(NamedTuple):
    file: str
    row_group: int
    row: int


@dataclass
class _Group:
    """A row group in memory, its lists end to end, and which of its rows were found sound."""

    ids: list[str]
    starts: np.ndarray  # [rows + 1] of each row in the flat lists
    token_ids: np.ndarray
    mask_starts: np.ndarray
    loss_mask: np.ndarray
    checksums: np.ndarray
    bytes: pa.ChunkedArray
    nbytes: int
    checked: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, table: pa.Table) -> "_Group":
        return cls(
            table["id"].to_pylist(),
            *_flat(table["token_ids"]),
            *_flat(table["loss_mask"]),
            table["checksum"].to_numpy(),
            table["features"],
            table.nbytes,
        )

    def tokens(self, row: int) -> Tensor:
        """[L] int64."""
        return torch.from_numpy(self.token_ids[self.starts[row] : self.starts[row + 1]].astype(np.int64))

    def mask(self, row: int) -> Tensor:
        """[L] bool."""
        return torch.from_numpy(self.loss_mask[self.mask_starts[row] : self.mask_starts[row + 1]].astype(bool))

    def features(self, row: int) -> pa.Buffer:
        """One row's bytes, as a view: a scalar of pyarrow's would be a copy."""
        index = row
        for chunk in self.bytes.chunks:
            if index < len(chunk):
                _, offsets, data = chunk.buffers()
                start, end = np.frombuffer(offsets, np.int64)[chunk.offset + index : chunk.offset + index + 2]
                return data.slice(int(start), int(end - start))
            index -= len(chunk)
        raise IndexError(row)


def _flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Where each list starts, and all elements."""
    joined = lists.combine_chunks()
    offsets = joined.offsets.to_numpy()
    return offsets - offsets[0], joined.flatten().to_numpy()


class FeatureDataset:
    """The conversations of one split ("train" or "validation"; None = all). May be read by several threads.

    `lengths` [N] holds the number of tokens of each. Raises DraftMismatch when the features are another target's,
    CorruptFile when a file is broken.
    """

    def __init__(
        self,
        store: Store,
        artifact: Artifact,
        split: str | None = None,
        target_identity: str | None = None,
        cache_bytes: int | None = None,
    ):
        self._folder = store.open(artifact)
        self._groups: OrderedDict[tuple[str, int], _Group] = OrderedDict()
        self._lock, self._reading = threading.Lock(), defaultdict(threading.Lock)
        self._group_bytes, self._cache_bytes = 0, cache_bytes or default_cache_bytes()
        names = shard_names(self._folder)
        with ThreadPoolExecutor(OPENING_THREADS) as threads:
            shards = list(threads.map(lambda name: _survey(self._folder, name), names))
        self.info = _common_info([shard.info for shard in shards], self._folder)
        if target_identity not in (None, self.info.target_identity):
            raise DraftMismatch(
                f"the features in {self._folder.url} are of the target {self.info.target_identity}, "
                f"this target is {target_identity}; extract features with this target"
            )
        self._remote = None if store.is_local else RemoteGroups(self._folder)
        self._footers = {} if store.is_local else {shard.name: shard.footer for shard in shards}
        rows = [row for shard in shards for row in shard.rows(split)]
        self._addresses = [address for address, _ in rows]
        self.lengths = np.array([length for _, length in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._addresses)

    @property
    def holds_features(self) -> bool:
        """False where only tokens and masks were stored, for the target to run again."""
        return self.info.encoding != "none"

    def many(self, indices: Sequence[int]) -> list[Conversation]:
        """Several conversations, in the order asked for."""
        return [self[i] for i in indices]

    def __getitem__(self, index: int) -> Conversation:
        return self._conversation(index, self._group(*self._addresses[index][:2]))

    def _conversation(self, index: int, group: _Group) -> Conversation:
        address = self._addresses[index]
        row = address.row
        where = f"{self._folder.url}/{address.file}, row group {address.row_group}, row {row} ({group.ids[row]})"
        data, unchecked = group.features(row), row not in group.checked
        if unchecked and checksum(data) != group.checksums[row]:
            if self._remote:  # perhaps only the local copy is bad
                self._remote.forget(address.file, address.row_group)
            raise CorruptFile(f"{where}: the checksum of the features differs; remove the stage and extract again")
        try:
            length, hidden, states = int(self.lengths[index]), self.info.hidden_size, self.info.states
            features = decode(data, states * length, hidden, self.info.encoding).view(-1, states * hidden)
        except (ValueError, OSError) as error:
            raise CorruptFile(f"{where}: {error}; remove the stage and extract again") from error
        conversation = Conversation.of(group.ids[row], group.tokens(row), group.mask(row), features, hidden)
        if unchecked:
            check(conversation, where, self.holds_features)
            group.checked.add(row)
        return conversation

    def warm(self, indices: Sequence[int]) -> None:
        """Have the row groups of these conversations in memory before they are asked for."""
        for file, row_group in dict.fromkeys(self._addresses[i][:2] for i in indices):
            self._group(file, row_group)

    def close(self) -> None:
        """Wait for what is still written to the local cache. The rows can be read on."""
        if self._remote:
            self._remote.finish()

    @property
    def groups_in_memory(self) -> int:
        """Row groups, of the usual size, that are kept in memory."""
        return self._cache_bytes // ROW_GROUP_BYTES

    @property
    def blocks(self) -> np.ndarray:
        """The first conversation of each row group, ascending."""
        groups = [address[:2] for address in self._addresses]
        return np.array([i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]], dtype=np.int64)

    def stream(self) -> Iterator[Conversation]:
        """All conversations in order; while one row group is used, threads read and check the next ones."""
        runs = ([i for i, _ in run] for _, run in groupby(enumerate(self._addresses), key=lambda item: item[1][:2]))
        count = min(MOST_GROUPS_AHEAD, os.cpu_count() or 1)
        with ThreadPoolExecutor(count) as threads:
            pending = deque(threads.submit(self._rows, run) for run in islice(runs, count))
            while pending:
                rows = pending.popleft().result()
                pending.extend(threads.submit(self._rows, run) for run in islice(runs, 1))
                yield from rows

    def answers(self) -> Iterator[Answer]:
        """Tokens and masks of all conversations in order, without their features: those columns alone are read."""
        for (file, number), run in groupby(self._addresses, key=lambda address: address[:2]):
            where = f"{self._folder.url}/{file}, row group {number}"
            with self._folder.open(file) as source, _parquet_named(where), pq.ParquetFile(source) as shard:
                table = shard.read_row_group(number, columns=["token_ids", "loss_mask"])
            starts, token_ids = _flat(table["token_ids"])
            mask_starts, mask = _flat(table["loss_mask"])
            for address in run:
                rows = slice(*starts[address.row : address.row + 2]), slice(*mask_starts[address.row : address.row + 2])
                yield Answer(torch.from_numpy(token_ids[rows[0]].copy()), torch.from_numpy(mask[rows[1]].astype(bool)))

    def _rows(self, indices: list[int]) -> list[Conversation]:
        """All of one row group, which the cache may forget meanwhile."""
        group = self._group(*self._addresses[indices[0]][:2])
        return [self._conversation(i, group) for i in indices]

    def _group(self, name: str, number: int) -> _Group:
        """One row group with all columns, from a cache that forgets the least recently used."""
        with self._lock:
            reading = self._reading[name, number]
        with reading:  # a second thread that wants the group waits for the first one to read it
            with self._lock:
                if (name, number) in self._groups:
                    self._groups.move_to_end((name, number))
                    return self._groups[name, number]
            group = self._read_group(name, number)
            with self._lock:
                self._groups[name, number] = group
                self._group_bytes += group.nbytes
                while self._group_bytes > self._cache_bytes and len(self._groups) > 1:
                    self._group_bytes -= self._groups.popitem(last=False)[1].nbytes
        return group

    def _read_group(self, name: str, number: int) -> _Group:
        if self._remote:
            return _Group.of(self._remote.read(name, self._footers[name], number))
        path = self._folder.local_path(name, rows_checked=True)
        with (
            _parquet_named(f"{self._folder.url}/{name}, row group {number}"),
            pq.ParquetFile(path, memory_map=True) as file,
        ):
            return _Group.of(file.read_row_group(number))


def check(conversation: Conversation, where: str, holds_features: bool = True) -> None:
    """Refuse a row whose parts disagree or are not finite. Raises CorruptFile naming `where`."""
    rows = conversation.features if holds_features else conversation.token_ids
    lengths = {len(conversation.token_ids), len(conversation.loss_mask), len(rows)}
    if len(lengths) != 1:
        raise CorruptFile(f"{where}: token ids, loss mask and features have the lengths {sorted(lengths)}")
    if not conversation.loss_mask.any():
        raise CorruptFile(f"{where}: no token is supervised")
    if not holds_features:
        return
    if not all(_is_finite(states) for states in (conversation.features, conversation.taps) if states is not None):
        raise CorruptFile(f"{where}: the features hold NaN or infinite values; extract again, in another dtype")


def _is_finite(features: Tensor) -> bool:
    """Read as an integer a bfloat16 is 0x7F80 for infinity and more for NaN; where it is negative, all that and 0x8000.

    So the largest of them, read with sign and without, tell; 20 times faster than to look at each.
    """
    signed = features.view(torch.int16).numpy()
    return int(signed.max()) < 0x7F80 and int(signed.view(np.uint16).max()) < 0xFF80


def shard_names(folder: StageFolder) -> list[str]:
    """The Parquet parts of a finished stage, in order. Raises CorruptFile when there is none."""
    manifest = folder.manifest()
    names = sorted(name for name in manifest.files if name.startswith("part-")) if manifest else []
    if not names:
        raise CorruptFile(f"{folder.url} holds no part-*.parquet; remove it and run the stage {folder.stage!r} again")
    return names


def default_cache_bytes() -> int:
    """An eighth of the machine's memory, and at least two gigabytes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(SMALLEST_CACHE_BYTES, int(memory * CACHE_SHARE))


@dataclass(frozen=True)
class _Survey:
    """What is known of a shard without reading features."""

    name: str
    info: FeatureInfo
    footer: pq.FileMetaData
    splits: list[str]
    lengths: list[int]

    def rows(self, split: str | None) -> Iterator[tuple[_RowAddress, int]]:
        counts = (self.footer.row_group(i).num_rows for i in range(self.footer.num_row_groups))
        addresses = (_RowAddress(self.name, g, i) for g, count in enumerate(counts) for i in range(count))
        for address, own, length in zip(addresses, self.splits, self.lengths, strict=True):
            if split in (None, own):
                yield address, length


def _survey(folder: StageFolder, name: str) -> _Survey:
    where = f"{folder.url}/{name}"
    with folder.open(name) as source, _parquet_named(where), pq.ParquetFile(source) as file:
        try:
            info = FeatureInfo.of(file.schema_arrow)
        except KeyError:
            raise CorruptFile(f"{where} is no feature shard: its schema says nothing of a target") from None
        except ValidationError as error:
            reasons = "; ".join(f"{problem['loc'][0]} = {problem['input']!r}" for problem in error.errors())
            raise CorruptFile(
                f"{where} was written by another version, and this one does not read {reasons}; "
                "remove the stage and extract again"
            ) from None
        table = file.read(columns=["split", "num_tokens"])
        footer = file.metadata
    return _Survey(name, info, footer, table["split"].to_pylist(), table["num_tokens"].to_pylist())


def _common_info(infos: list[FeatureInfo], folder: StageFolder) -> FeatureInfo:
    for info in infos:  # another version of the code may have written some of them
        if info != infos[0].model_copy(update={"code_version": info.code_version}):
            raise CorruptFile(
                f"the shards of {folder.url} disagree about their target or encoding: {infos[0]} and {info}; "
                "remove the stage and extract again"
            )
    return infos[0]


@contextmanager
def _parquet_named(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        message = f"{where} is not readable Parquet: {error}; remove the stage and extract again"
        raise CorruptFile(message) from error
