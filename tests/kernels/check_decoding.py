"""The decoding kernels beside PyTorch, on a GPU or in Triton's interpreter; run by test_kernels.py as a program."""

from copy import copy
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from hass_core import kernels
from hass_core.decoding.drafter import Children, Frontier, Level, next_frontier
from hass_core.decoding.sampler import Noise
from hass_core.kernels.few_rows import Norm, added_product, added_product_to_norm, product
from hass_core.kernels.frontier import best_candidates
from hass_core.kernels.noise import UNFUSED
from hass_core.kernels.noise import gumbel as noise_of
from hass_core.kernels.tiles import Tiles
from hass_core.kernels.top_k import RowNoise, row_top_k
from hass_core.kernels.tree_attention import tree_attention
from hass_core.sampling import as_signed, gumbel, stream
from hass_core.target_model.block import LayerShape, Linear, in_eight_bits, restored
from hass_core.target_model.kv_cache import KVCache, MaskedAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the interpreter takes its time for every program: it gets fewer of them, of the same kinds
VOCABULARY, HIDDEN = (49152, 576) if DEVICE.type == "cuda" else (12288, 160)
ATTENTION = {  # batch, new tokens, heads, key-value heads, head size, slots, offset, columns of `visible`
    "one token": (1, 1, 9, 3, 64, 256, 0, None),
    "rows of different lengths, odd head size": (2, 1, 4, 2, 24, 300, 0, None),
    "a tree": (2, 9, 6, 2, 48, 300, 0, 9),
    "a level of a tree behind two others": (1, 7, 4, 4, 16, 200, 14, 28),
    "several causal tokens": (3, 5, 8, 2, 32, 200, 0, None),
    "more causal tokens than are taken at once": (1, 70, 4, 4, 16, 300, 0, None),
    "a tree over a long context, which programs share": (1, 9, 6, 3, 64, 1600, 0, 9),
    "a level of a tree over a long context": (2, 5, 8, 2, 64, 2200, 10, 20),
    "a tree of several blocks": (1, 60, 9, 3, 64, 400, 0, 60),
}


def check_attention(name: str, batch: int, tokens: int, heads: int, kv: int, dim: int, slots: int, offset, columns):
    qkv = torch.randn(batch, tokens, heads + 2 * kv, dim, device=DEVICE)
    cos, sin = torch.randn(2, batch, tokens, 1, dim, device=DEVICE)
    visible = None
    if columns is not None:
        visible = torch.rand(batch, tokens, columns, device=DEVICE) < 0.5
        visible[:, :, offset + tokens :] = False
        visible[:, :, offset : offset + tokens] |= torch.eye(tokens, dtype=torch.bool, device=DEVICE)
    cache = KVCache.allocate([LayerShape(kv, dim)], batch, slots, DEVICE, torch.float32)
    cache.blocks[0].normal_()
    cache.advance(torch.randint(0, slots - offset - tokens, (batch,)).tolist())
    keys, values = (part.clone() for part in cache.layers[0])
    got = tree_attention(qkv, cos, sin, keys, values, cache.lengths, offset, visible)
    attention = MaskedAttention.of(tokens, cache, heads // kv, torch.float32, visible, offset)
    expected = attention(qkv, cos, sin, *cache.layers[0])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")
    torch.testing.assert_close(keys, cache.layers[0][0], msg=lambda text: f"{name}, keys: {text}")
    torch.testing.assert_close(values, cache.layers[0][1], msg=lambda text: f"{name}, values: {text}")


def check_top_k(rows: int, size: int, k: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, size, device=DEVICE).to(dtype)  # of 16 bits many are equal
    logits[0, :3] = torch.tensor([-torch.inf, -0.0, 0.0])
    ordered, order = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    expected = (ordered[:, :k] - logits.float().logsumexp(-1, keepdim=True)).clamp(max=0)
    scores, index = row_top_k(logits, k)
    assert torch.equal(index, order[:, :k]), "ties go to the lower index"
    torch.testing.assert_close(scores, expected)
    token_ids = torch.randperm(size, device=DEVICE)
    assert torch.equal(row_top_k(logits, k, token_ids)[1], token_ids[index])
    logits[0, size // 2] = torch.nan
    assert row_top_k(logits, k)[0][0].isnan().all(), "a logit that is no number shows in all scores of its row"


@triton.jit
def _written(streams, position, noise, count, SIZE: tl.constexpr):
    """Program: the noise of the tokens from 0 to `count`."""
    token = tl.arange(0, SIZE)
    tl.store(noise + token, noise_of(streams, position, token), mask=token < count)


def check_noise(seed: int, row: int, position: int) -> None:
    """Bit by bit what the CPU's is."""
    streams = as_signed([stream(seed, row)]).to(DEVICE)
    noise = torch.empty(5000, device=DEVICE)
    _written[(1,)](streams, torch.tensor(position).item(), noise, 5000, SIZE=8192, **UNFUSED)
    expected = gumbel(stream(seed, row), position, np.arange(5000, dtype=np.uint32))
    assert np.array_equal(noise.cpu().numpy().view(np.uint32), expected.view(np.uint32))


def check_perturbed(rows: int, nodes: int, size: int, k: int, dtype: torch.dtype) -> None:
    """The kernel's choice with noise beside PyTorch's, for whole and trimmed vocabularies, with an edge or not."""
    fused, plain = (Noise(rows, size, DEVICE, fused) for fused in (True, False))
    fused.start(5)
    plain.start(5)
    logits = (2 * torch.randn(rows, nodes, size, device=DEVICE)).to(dtype)
    positions = torch.randint(10, (rows, nodes), device=DEVICE)
    for token_ids in (None, torch.randperm(size, device=DEVICE)[: size // 3]):
        some = logits if token_ids is None else logits[..., : size // 3].contiguous()
        for lowest in (None, torch.full((rows, nodes, 1), 3.0, device=DEVICE)):
            for at in (positions, positions[:, :1]):
                noise = RowNoise(fused.streams, at, 3, 1.4, 1.7, lowest)
                scores, index = row_top_k(some.flatten(0, 1), k, token_ids, noise)
                expected, order = plain.largest(some, at, k, 1.4, 1.7, 3, token_ids, lowest)
                assert torch.equal(index, order.flatten(0, 1)), "the same candidates in the same order"
                if k > 1:
                    torch.testing.assert_close(scores, expected.flatten(0, 1), atol=2e-5, rtol=1e-5)
    logits[0, 0, size // 2] = torch.nan
    scores, _ = row_top_k(logits.flatten(0, 1), k, None, RowNoise(fused.streams, positions, 3, 1.4, 1.7))
    assert scores[0].isnan().all()
    assert scores[1:].isfinite().all()


def check_frontier(batch: int, top_k: int, hidden: int, number: int) -> None:
    """The kernel's choice of a level beside PyTorch's."""
    level = Level(
        Frontier(
            torch.randint(100, (batch, top_k), device=DEVICE),
            torch.randn(batch, top_k, 2 * hidden, device=DEVICE),
            torch.randn(batch, top_k, device=DEVICE).round(decimals=1),  # ties
            torch.arange(top_k, device=DEVICE).expand(batch, -1),
            torch.rand(batch, top_k, 4 * top_k, device=DEVICE) < 0.3,
        ),
        Children(
            torch.randn(batch, top_k, top_k, device=DEVICE).round(decimals=1),
            torch.randint(100, (batch, top_k, top_k), device=DEVICE),
        ),
    )
    level.children.scores[0, top_k // 2, 0] = torch.nan
    features, embedding = torch.randn(batch, top_k, hidden, device=DEVICE), torch.randn(100, hidden, device=DEVICE)
    rows_from, candidates_from = number * top_k, top_k + (number - 1) * top_k * top_k
    frontier, children = level
    got = best_candidates(
        frontier.scores, *children, frontier.seen, features, embedding, rows_from, candidates_from
    )  # fmt: skip
    with patch.object(kernels, "usable", lambda x: False):
        expected = next_frontier(level, features, embedding, number)
    for name, one, other in zip(Frontier._fields, got, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None, eight_bits: bool = False):
    """A layer with the weights as the kernels take them, also on a CPU, and the weights that it stands for."""
    own = Linear(weight, bias)
    own.weight = weight
    if not eight_bits:
        return own, weight
    own.weight, own.scale = rounded = in_eight_bits(weight)
    return own, restored(*rounded, torch.float32)


def random_layer(outputs: int, inputs: int, bias: torch.Tensor | None = None, eight_bits: bool = False):
    return layer_of(torch.randn(outputs, inputs, device=DEVICE) / inputs**0.5, bias, eight_bits)


def check_few_rows(rows: int, hidden: int, between: int, eight_bits: bool) -> None:
    """A residual, the norm behind it, a gated product of that, and back: as the second half of a decoder layer."""
    x, residual = torch.randn(2, 1, rows, hidden, device=DEVICE)
    weight, bias = torch.rand(2, hidden, device=DEVICE)
    wide_bias = torch.rand(2 * between, device=DEVICE)
    own_out, out = random_layer(hidden, hidden, bias, eight_bits)
    own_down, down = random_layer(hidden, between, None, eight_bits)
    own_gate_up, gate_up = random_layer(2 * between, hidden, None, eight_bits)
    own_biased = copy(own_gate_up)
    own_biased.bias = wide_bias
    y, ready = added_product_to_norm(x, own_out, residual, Norm(weight, 1e-5))
    plain = residual + F.linear(x, out, bias)
    torch.testing.assert_close(y, plain, atol=1e-4, rtol=1e-4)
    normed = F.rms_norm(plain, (hidden,), weight, 1e-5)
    expected = F.linear(normed, gate_up, wide_bias)
    torch.testing.assert_close(product(ready, own_biased), expected, atol=1e-4, rtol=1e-4)
    gate, up = F.linear(normed, gate_up).chunk(2, -1)
    gated = product(ready, own_gate_up, gated=True)
    torch.testing.assert_close(gated, F.silu(gate) * up, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(added_product(gated, own_down, y), plain + F.linear(gated, down), atol=1e-4, rtol=1e-4)
    assert torch.equal(added_product_to_norm(x, own_out, residual, Norm(weight, 1e-5))[1].squares, ready.squares)


def check_shared_inputs(rows: int, hidden: int, between: int, splits: int) -> None:
    """Programs that share a product's inputs give what one gives; twice, since they count with what they leave."""
    norm, residual = Norm(torch.rand(hidden, device=DEVICE), 1e-5), torch.randn(rows, hidden, device=DEVICE)
    x = torch.randn(rows, between, device=DEVICE)
    (down, _), (gate_up, _) = random_layer(hidden, between), random_layer(2 * between, hidden)
    y, ready = added_product_to_norm(x, down, residual, norm)
    gated = product(ready, gate_up, gated=True)
    shared = Tiles(16, 16, 4, 2, splits)
    for _ in range(2):
        shared_y, shared_ready = added_product_to_norm(x, down, residual, norm, shared)
        torch.testing.assert_close(shared_y, y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(product(shared_ready, gate_up, True, shared), gated, atol=1e-5, rtol=1e-5)


def check_half_precision(rows: int, hidden: int, outputs: int) -> None:
    """Numbers beyond float16 are cut off there; the others are as exact as in bfloat16."""
    layer, weight = random_layer(outputs, hidden, eight_bits=True)
    x = torch.randn(rows, hidden, device=DEVICE).bfloat16()
    expected = (x.float() @ weight.T).bfloat16()
    torch.testing.assert_close(product(x, layer), expected, atol=1e-2, rtol=2e-2)
    x[0, 0] = 1e30
    assert product(x, layer).isfinite().all()


torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
for sizes in ((1, 64, 96), (1, 200, 33), (2, 64, 96), (10, 80, 128), (60, HIDDEN, 40), (17, 200, 33)):
    for bits in (False, True):
        check_few_rows(*sizes, eight_bits=bits)
for sizes in ((10, 80, 128, 2), (3, 64, 100, 3), (40, HIDDEN, 96, 4)):
    check_shared_inputs(*sizes)
check_half_precision(10, 128, 80)
for case, sizes in ATTENTION.items():
    check_attention(case, *sizes)
with patch("hass_core.kernels.tree_attention.shared_memory", lambda device: 99 << 10):
    for case in ("more causal tokens than are taken at once", "a level of a tree over a long context"):
        check_attention(f"{case}, in little memory", *ATTENTION[case])
for sizes in ((3, 5000, 10), (2, VOCABULARY, 10), (1, 1024, 1), (4, 100, 7)):
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        check_top_k(*sizes, kind)
for case in ((0, 0, 0), (7, 3, 11), (-1, 60, 130_000)):
    check_noise(*case)
for sizes in ((2, 3, 5000, 4), (1, 2, VOCABULARY, 10), (3, 2, 900, 1)):
    for kind in (torch.bfloat16, torch.float32):
        check_perturbed(*sizes, kind)
for sizes in ((1, 10, 48, 1), (3, 4, 1500, 2), (2, 1, 16, 3)):
    check_frontier(*sizes)
