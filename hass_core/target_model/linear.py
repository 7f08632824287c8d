"""A matrix product whose weight is laid out once for the processor it runs on.

On a CPU oneDNN re-orders a weight into blocks on every call unless it is handed one already in blocks: packing made
SmolLM2-135M's token 1.5 times faster in bfloat16, and a tree of 8 tokens 1.6 times faster in float32. The blocks are a
copy, so on a CPU decoding needs the weights' memory a second time. On a GPU the weight itself is used, and a handful of
rows goes through `hass_core.kernels.few_rows`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core import kernels

MOST_FEW_ROWS = 64
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
EIGHT_BITS = torch.float8_e4m3fn


class Linear:
    """y [..., out] = x [..., in] · weightᵀ + bias, for frozen weights [out, in].

    With `eight_bits` the weights are rounded to fp8 with a scale per output. On a GPU that halves what a few rows wait
    for, while more rows restore the weights for every call; a CPU, or a GPU without fp8, keeps them restored, so that
    all compute the same.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, eight_bits: bool = False):
        self.bias, self.scale = bias, None
        weight = weight.detach()
        if eight_bits:
            rounded, scale = in_eight_bits(weight)
            if kernels.takes_eight_bits(weight):
                weight, self.scale = rounded, scale
            else:
                weight = restored(rounded, scale, weight.dtype)
        self._packed = packable(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        weight = self.weight if self.scale is None else restored(self.weight, self.scale, x.dtype)
        return F.linear(x, weight, self.bias)

    def of_few_rows(self, x: Tensor) -> Tensor:
        """The same, by the kernel for few rows where it serves."""
        if not few_rows(x, x.numel() // x.shape[-1]):
            return self(x)
        from hass_core.kernels.few_rows import product  # Triton is there on a GPU only

        return product(x, self)


def few_rows(x: Tensor, rows: int) -> bool:
    """Whether the kernels of `hass_core.kernels.few_rows` serve `rows` rows like x."""
    return rows <= MOST_FEW_ROWS and x.dtype in SIXTEEN_BITS and kernels.usable(x)


def in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 weights [out, in] and the float32 scale [out] of each row's largest onto fp8's largest."""
    scale = weight.abs().amax(1).float().clamp(min=1e-12) / torch.finfo(EIGHT_BITS).max
    return (weight.float() / scale[:, None]).to(EIGHT_BITS), scale


def restored(rounded: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that `in_eight_bits` stands for."""
    return (rounded.float() * scale[:, None]).to(dtype)


def packable(weight: Tensor) -> bool:
    """Whether this processor has blocked products for the weight's type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
