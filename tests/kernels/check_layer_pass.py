"""Layers in one launch beside PyTorch, on a GPU or in Triton's interpreter; run by test_kernels.py as a program."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.kernels.layer_pass import LayerParts, LayerPass, Sizes
from hass_core.target.kv_cache import KVCache, LayerShape
from hass_core.target.linear import in_eight_bits, restored
from hass_core.target.placement import MaskedPlacement

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE, EPS = torch.float32, 1e-5
CASES = {  # layers, sizes, batch, new tokens, live slots, offset, columns of `visible`, fused, fp8, biases
    "one token": (3, Sizes(48, 6, 2, 16, 80), 1, 1, [70], 0, None, False, False, False),
    "different lengths, odd head size": (2, Sizes(40, 4, 2, 24, 56), 3, 1, [0, 5, 130], 0, None, False, False, True),
    "several causal tokens": (2, Sizes(32, 4, 4, 16, 64), 2, 5, [66, 3], 0, None, False, False, False),
    "a long context in shares": (1, Sizes(32, 4, 2, 16, 48), 2, 3, [1500, 700], 0, 3, False, False, False),
    "a tree": (3, Sizes(64, 9, 3, 16, 96), 1, 60, [200], 0, 60, False, False, True),
    "a draft's level behind two others": (1, Sizes(48, 6, 2, 16, 80), 2, 7, [65, 9], 14, 28, True, False, True),
    "a draft's level in fp8": (1, Sizes(64, 4, 2, 16, 96), 1, 10, [100], 10, 50, True, True, False),
}  # fmt: skip


@dataclass
class Own:
    """A layer as the kernels take it."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


def linear(outputs: int, inputs: int, bias: bool, eight_bits: bool) -> tuple[Own, Tensor]:
    """A random layer, and the weights that it stands for."""
    weight = torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE) / inputs**0.5
    own_bias = torch.randn(outputs, device=DEVICE, dtype=DTYPE) if bias else None
    if not eight_bits:
        return Own(weight, own_bias), weight
    rounded, scale = in_eight_bits(weight)
    return Own(rounded, own_bias, scale), restored(rounded, scale, DTYPE)


def check(name: str, count, sizes: Sizes, batch, tokens, lengths, offset, columns, fused, eight_bits, biases) -> None:
    hidden, heads, kv, dim = sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim
    cache = KVCache.allocate([LayerShape(kv, dim)] * count, batch, max(lengths) + offset + 64, DEVICE, DTYPE)
    cache.blocks[0].normal_()
    cache.advance(lengths)
    ours = KVCache([block.clone() for block in cache.blocks], cache.lengths.clone(), cache.host_lengths.copy())
    x = torch.randn(batch, tokens, hidden * (2 if fused else 1), device=DEVICE, dtype=DTYPE)
    cos, sin = torch.randn(2, batch, tokens, 1, dim, device=DEVICE, dtype=DTYPE)
    visible = None
    if columns is not None:
        visible = torch.rand(batch, tokens, columns, device=DEVICE) < 0.5
        visible[:, :, offset + tokens :] = False
        visible[:, :, offset : offset + tokens] |= torch.eye(tokens, dtype=torch.bool, device=DEVICE)
    norms = torch.rand(count + 1, hidden, device=DEVICE, dtype=DTYPE) + 0.5
    fuse, whole_fuse = linear(hidden, 2 * hidden, biases, eight_bits) if fused else (None, None)
    layers, plain = [], []
    for number in range(count):
        made = [
            linear((heads + 2 * kv) * dim, hidden, biases, eight_bits),
            linear(hidden, heads * dim, biases and not fused, eight_bits),
            linear(2 * sizes.inner, hidden, False, eight_bits),
            linear(hidden, sizes.inner, False, eight_bits),
        ]  # fmt: skip
        mlp_norm = torch.rand(hidden, device=DEVICE, dtype=DTYPE) + 0.5
        layers.append(LayerParts(*(own for own, _ in made), mlp_norm, norms[number + 1]))
        plain.append([weight for _, weight in made])

    y = x.clone() if whole_fuse is None else F.linear(x, whole_fuse, fuse.bias)
    place = MaskedPlacement.of(tokens, cache, visible, heads // kv, DTYPE, offset)
    for number, (parts, (qkv, o, gate_up, down)) in enumerate(zip(layers, plain, strict=True)):
        normed = y if fused else F.rms_norm(y, (hidden,), norms[number], EPS)
        mixed = F.linear(normed, qkv, parts.qkv.bias).unflatten(-1, (-1, dim))
        y = y + F.linear(place.attention(mixed, cos, sin, *cache.layers[number]), o, parts.o.bias)
        gate, up = F.linear(F.rms_norm(y, (hidden,), parts.norm, EPS), gate_up).chunk(2, -1)
        y = y + F.linear(F.silu(gate) * up, down)

    layer_pass = LayerPass(layers, sizes, EPS, fuse)
    for again in ("", " again"):  # what programs count with must be as before
        ready = None if fused else F.rms_norm(x, (hidden,), norms[0], EPS)
        got = layer_pass(x.clone(), ready, (cos, sin), ours, offset, visible)
        for part, value, expected in (("", got, y), (", cache", ours.blocks[0], cache.blocks[0])):
            where = f"{name}{again}{part}"
            torch.testing.assert_close(
                value, expected, atol=2e-4, rtol=1e-3, msg=lambda text, where=where: f"{where}: {text}"
            )


torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
for case, sizes in CASES.items():
    check(case, *sizes)
