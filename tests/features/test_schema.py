"""Features as bytes: what is lossless returns every bit, what is small stays close, and checksums see damage."""

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hass_core.features.schema import bytes_per_token, checksum, decode, encode


@given(tokens=st.integers(1, 40), hidden=st.sampled_from([2, 16, 48]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_bf16_returns_every_bit(tokens, hidden, seed):
    torch.manual_seed(seed)
    features = (torch.randn(tokens, hidden) * 10 ** torch.randn(hidden)).bfloat16()
    data = pa.py_buffer(encode(features, "bf16"))
    assert torch.equal(decode(data, tokens, hidden, "bf16"), features)


def test_int8_halves_the_space_and_stays_close():
    features = torch.randn(100, 64).bfloat16()
    data = encode(features, "int8")
    assert len(data) == 100 * bytes_per_token("int8", 64) < 0.52 * len(encode(features, "bf16"))
    back = decode(pa.py_buffer(data), 100, 64, "int8")
    assert (back.float() - features.float()).norm() / features.float().norm() < 0.02


@given(st.data(), st.integers(1, 20_000))
@settings(max_examples=60, deadline=None)
def test_the_checksum_sees_changed_moved_and_missing_bytes(data, size):
    content = np.random.default_rng(size).bytes(size)
    place = data.draw(st.integers(0, size - 1))
    other = data.draw(st.integers(1, 255))
    changed = content[:place] + bytes([content[place] ^ other]) + content[place + 1 :]
    assert checksum(changed) != checksum(content) == checksum(pa.py_buffer(content))
    assert checksum(content[:-1]) != checksum(content)
    assert checksum(content + b"\0") != checksum(content)
    for width in (8, 4096):  # words and blocks that changed places
        if len(moved := content[width : 2 * width] + content[:width] + content[2 * width :]) > 2 * width:
            assert checksum(moved) != checksum(content)
