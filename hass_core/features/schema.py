"""What a feature shard is: columns, file metadata, and how features become bytes. The only place that names them.

One row is one conversation. `features` holds num_tokens × hidden_size numbers, the target's hidden state after its
final norm, in the encoding that the metadata names; `checksum` that of those bytes. bf16 is exact where the target
computes in bfloat16; int8 halves the space: one bfloat16 scale per state, all of them written before the numbers.

A draft that reads states inside the target has these stored after the last one: a token is then S = 1 + n states of H
numbers, first the last one, then those after the layers `taps` that the metadata names.

Shapes: L tokens, H hidden size, S states a token, R = S·L rows.
"""

import zlib
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from pydantic import AliasChoices, BaseModel, Field
from torch import Tensor

from hass_core import __version__
from hass_core.features.sizes import Encoding as Encoding
from hass_core.features.sizes import bytes_per_token as bytes_per_token

Numbers = Sequence[int] | np.ndarray

BLOCK_WORDS = 512  # of eight bytes

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),  # train or validation
        ("num_tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),  # 1 = the token belongs to an answer, its end token included
        ("checksum", pa.uint32()),
        ("features", pa.large_binary()),
    ]
)
SKIPPED = pa.schema([("id", pa.string()), ("reason", pa.string())])
METADATA_KEY = b"hass"


class FeatureInfo(BaseModel, frozen=True):
    """What a shard's numbers mean; stands in the Parquet schema's metadata."""

    hidden_size: int
    encoding: Encoding
    target_identity: str = Field(validation_alias=AliasChoices("target_identity", "target_fingerprint"))  # its digest
    code_version: str = __version__
    taps: tuple[int, ...] = ()  # layers after which states are stored after the last one, as vLLM counts

    @property
    def states(self) -> int:
        """S."""
        return 1 + len(self.taps)

    def schema(self) -> pa.Schema:
        """The columns with this information attached; taps are named where there are any."""
        metadata = self.model_dump_json(exclude=None if self.taps else {"taps"})
        return COLUMNS.with_metadata({METADATA_KEY: metadata.encode()})

    @classmethod
    def of(cls, schema: pa.Schema) -> "FeatureInfo":
        """Read the information back. Raises KeyError when the file is no feature shard."""
        return cls.model_validate_json((schema.metadata or {})[METADATA_KEY])


def encode(features: Tensor, encoding: Encoding) -> bytes | memoryview:
    """Bytes of states [R, H], S a token (any float type), for bf16 without a copy where they lie on the CPU already."""
    if encoding == "none":
        return b""
    exact = features.detach().to("cpu", torch.bfloat16).contiguous()
    if encoding == "bf16":
        return _raw(exact)
    largest = exact.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
    scale = (largest / 127).bfloat16()
    small = (exact.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return bytes(_raw(scale)) + bytes(_raw(small))


def decode(data: pa.Buffer, rows: int, hidden_size: int, encoding: Encoding) -> Tensor:
    """bfloat16 states [R, H]; for "bf16" a view of `data` without a copy. Raises ValueError on a wrong length."""
    expected = rows * bytes_per_token(encoding, hidden_size)
    if data.size != expected:
        raise ValueError(f"{data.size} bytes where {rows} states × {hidden_size} need {expected}")
    if encoding == "none":
        return torch.empty(0, hidden_size, dtype=torch.bfloat16)
    numbers = torch.from_dlpack(pa.Array.from_buffers(pa.uint8(), data.size, [None, data]))
    if encoding == "bf16":
        return numbers.view(torch.bfloat16).view(rows, hidden_size)
    scale = numbers[: 2 * rows].view(torch.bfloat16).view(-1, 1)
    small = numbers[2 * rows :].view(torch.int8)
    return (small.view(rows, hidden_size).float() * scale.float()).bfloat16()


def checksum(data: bytes | memoryview | pa.Buffer) -> int:
    """32 bits that change when bytes change or move; several times faster than a CRC of all the data.

    It is the CRC-32 of the sums (of 64-bit words, wrapping) over each 4 KB block, the sums over each place in the
    blocks, and the bytes after the last whole block.
    """
    whole = len(data) // (8 * BLOCK_WORDS)
    blocks = np.frombuffer(data, np.uint64, whole * BLOCK_WORDS).reshape(whole, BLOCK_WORDS)
    of_columns = zlib.crc32(blocks.sum(0, dtype=np.uint64).tobytes())
    of_blocks = zlib.crc32(blocks.sum(1, dtype=np.uint64).tobytes(), of_columns)
    return zlib.crc32(memoryview(data)[8 * BLOCK_WORDS * whole :], of_blocks)


def to_lists(values: Sequence[Numbers], dtype: type) -> pa.ListArray:
    """An Arrow column with one list for each value, laid end to end; no number becomes an object of Python's."""
    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    flat = np.concatenate([np.empty(0, dtype), *(np.asarray(value, dtype) for value in values)])
    return pa.ListArray.from_arrays(offsets, flat)


def from_lists(lists: pa.ListArray) -> Iterable[np.ndarray]:
    """Each list as a view of the values."""
    offsets, flat = lists.offsets.to_numpy(), lists.values.to_numpy()
    return (flat[start:end] for start, end in pairwise(offsets))


def _raw(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).flatten().numpy().data
