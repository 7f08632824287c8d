"""One part of the responses, tokenised and masked: what the target reads."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from hass_core.config import FeaturesConfig
from hass_core.data.conversations import from_stored
from hass_core.data.templates import SkippedConversation, encode_conversation
from hass_core.features.lists import from_lists, to_lists
from hass_core.features.schema import COLUMNS, SKIPPED

_CONVERSATIONS = pa.schema([COLUMNS.field(name) for name in ("id", "split", "token_ids", "loss_mask")])


@dataclass(frozen=True)
class Encoded:
    """One conversation of L tokens, ready for the target."""

    id: str
    split: str
    token_ids: np.ndarray  # [L] int32
    loss_mask: np.ndarray  # [L] uint8


@dataclass(frozen=True)
class Part:
    """One part of the responses, tokenised."""

    name: str
    conversations: list[Encoded]
    skipped: list[tuple[str, str]]  # id and reason

    @property
    def tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.conversations)

    @property
    def supervised_tokens(self) -> int:
        return sum(int(c.loss_mask.sum()) for c in self.conversations)

    def to_bytes(self) -> bytes:
        """Two Arrow streams, conversations and skipped ones; no number becomes an object of Python's on the way."""
        found = self.conversations
        columns = (
            pa.array([c.id for c in found], pa.string()),
            pa.array([c.split for c in found], pa.string()),
            to_lists([c.token_ids for c in found], np.int32),
            to_lists([c.loss_mask for c in found], np.uint8),
        )
        sink = pa.BufferOutputStream()
        for table in (
            pa.Table.from_arrays(list(columns), schema=_CONVERSATIONS),
            pa.Table.from_pylist([{"id": name, "reason": reason} for name, reason in self.skipped], SKIPPED),
        ):
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> "Part":
        """Read it back; the arrays are views of `data`."""
        source = pa.BufferReader(data)
        conversations, skipped = (pa.ipc.open_stream(source).read_all() for _ in range(2))
        columns = (conversations[column].combine_chunks() for column in _CONVERSATIONS.names)
        ids, splits, tokens, masks = columns
        rows = zip(ids.to_pylist(), splits.to_pylist(), from_lists(tokens), from_lists(masks), strict=True)
        return cls(name, [Encoded(*row) for row in rows], [(row["id"], row["reason"]) for row in skipped.to_pylist()])


def encode_part(
    name: str, path: Path, tokenizer: PreTrainedTokenizerBase, settings: FeaturesConfig, limit: int | None = None
) -> Part:
    """Token ids and masks of the first `limit` conversations of a part."""
    part = Part(name, [], [])
    for row in pq.read_table(path).slice(0, limit).to_pylist():
        try:
            messages, tools = from_stored(row)
            found = encode_conversation(tokenizer, messages, row["answer_token_ids"], tools)
        except SkippedConversation as problem:
            part.skipped.append((row["id"], problem.reason))
            continue
        ids, mask = (x[: settings.max_tokens_per_conversation] for x in (found.token_ids, found.loss_mask))
        if not any(mask):
            part.skipped.append((row["id"], "no answer within max_tokens_per_conversation"))
        else:
            split = split_of(row["id"], settings.validation_fraction)
            part.conversations.append(Encoded(row["id"], split, np.array(ids, np.int32), np.array(mask, np.uint8)))
    return part


def split_of(name: str, validation_fraction: float) -> str:
    """`validation` for that fraction of the ids, the same on every run."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") / 2**64
    return "validation" if position < validation_fraction else "train"
