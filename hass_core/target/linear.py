"""A matrix product whose weight is laid out once for the processor it runs on, and what a decoder layer puts around it.

On a CPU oneDNN re-orders a weight into blocks on every call unless it is handed one already in blocks: packing made
SmolLM2-135M's token 1.5 times faster in bfloat16, and a tree of 8 tokens 1.6 times faster in float32. The blocks are a
copy, so on a CPU decoding needs the weights' memory a second time. On a GPU the weight itself is used; a few rows go
through `hass_core.kernels.linear`, which normalises, gates and adds in the same kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core import kernels

FEW_ROWS = 128


class Linear:
    """y [..., out] = x [..., in] · weightᵀ + bias, for frozen weights [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self._bias = bias
        self._packed = packable(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)

    def of_normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The product with RMSNorm(x), its weight `norm` [in]."""
        if few(x) and kernels.usable(x):
            from hass_core.kernels.linear import linear  # Triton is there on a GPU only

            return linear(x, self._weight, norm, eps, bias=self._bias)
        return self(F.rms_norm(x, (x.shape[-1],), norm, eps))

    def gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """silu(gate) · up [..., out / 2], the halves of the product with RMSNorm(x)."""
        if few(x) and kernels.usable(x):
            from hass_core.kernels.linear import linear

            return linear(x, self._weight, norm, eps, gated=True)
        gate, up = self.of_normed(x, norm, eps).chunk(2, dim=-1)
        return F.silu(gate) * up

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [..., out] + the product."""
        if few(x) and kernels.usable(x):
            from hass_core.kernels.linear import linear

            return linear(x, self._weight, residual=residual, bias=self._bias)
        return residual + self(x)


def few(x: Tensor) -> bool:
    """Whether x [..., in] has so few rows that a product is bound by reading its weight."""
    return x.numel() <= FEW_ROWS * x.shape[-1]


def packable(weight: Tensor) -> bool:
    """Whether this processor has blocked products for the weight's type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
