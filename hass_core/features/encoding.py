"""How features become bytes and back. bf16 is lossless; int8 halves the space.

int8 keeps one bfloat16 scale per token, all of them written before the numbers.

Shapes: L tokens, H hidden size.
"""

import zlib

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hass_core.features.schema import Encoding

BLOCK_WORDS = 512  # of eight bytes


def bytes_per_token(encoding: Encoding, hidden_size: int) -> int:
    """Bytes of one token's features, before compression."""
    if encoding == "none":
        return 0
    return 2 * hidden_size if encoding == "bf16" else hidden_size + 2


def encode(features: Tensor, encoding: Encoding) -> bytes | memoryview:
    """Bytes of features [L, H] (any float type), for bf16 without a copy where they lie on the CPU already."""
    if encoding == "none":
        return b""
    exact = features.detach().to("cpu", torch.bfloat16).contiguous()
    if encoding == "bf16":
        return _raw(exact)
    largest = exact.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
    scale = (largest / 127).bfloat16()
    small = (exact.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return bytes(_raw(scale)) + bytes(_raw(small))


def decode(data: pa.Buffer, num_tokens: int, hidden_size: int, encoding: Encoding) -> Tensor:
    """bfloat16 features [L, H]; for "bf16" a view of `data` without a copy. Raises ValueError on a wrong length."""
    expected = num_tokens * bytes_per_token(encoding, hidden_size)
    if data.size != expected:
        raise ValueError(f"{data.size} bytes where {num_tokens} tokens × {hidden_size} need {expected}")
    if encoding == "none":
        return torch.empty(0, hidden_size, dtype=torch.bfloat16)
    numbers = torch.from_dlpack(pa.Array.from_buffers(pa.uint8(), data.size, [None, data]))
    if encoding == "bf16":
        return numbers.view(torch.bfloat16).view(num_tokens, hidden_size)
    scale = numbers[: 2 * num_tokens].view(torch.bfloat16).view(-1, 1)
    small = numbers[2 * num_tokens :].view(torch.int8)
    return (small.view(num_tokens, hidden_size).float() * scale.float()).bfloat16()


def checksum(data: bytes | memoryview | pa.Buffer) -> int:
    """32 bits that change when bytes change or move; several times faster than a CRC of all the data.

    It is the CRC-32 of the sums (of 64-bit words, wrapping) over each 4 KB block, the sums over each place in the
    blocks, and the bytes behind the last whole block.
    """
    whole = len(data) // (8 * BLOCK_WORDS)
    blocks = np.frombuffer(data, np.uint64, whole * BLOCK_WORDS).reshape(whole, BLOCK_WORDS)
    of_places = zlib.crc32(blocks.sum(0, dtype=np.uint64).tobytes())
    of_blocks = zlib.crc32(blocks.sum(1, dtype=np.uint64).tobytes(), of_places)
    return zlib.crc32(memoryview(data)[8 * BLOCK_WORDS * whole :], of_blocks)


def _raw(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).flatten().numpy().data
