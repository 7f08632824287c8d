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

FEW_ROWS = range(2, 65)  # a single row is a sum over the weights, for which torch.compile's kernels are as fast
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Linear:
    """y [..., out] = x [..., in] · weightᵀ + bias, for frozen weights [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.bias = bias
        self._packed = packable(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def of_few_rows(self, x: Tensor) -> Tensor:
        """The same, by the kernel for few rows where it serves."""
        if not few_rows(x, x.numel() // x.shape[-1]):
            return self(x)
        from hass_core.kernels.few_rows import product  # Triton is there on a GPU only

        return product(x, self.weight, self.bias)


def few_rows(x: Tensor, rows: int) -> bool:
    """Whether the kernels of `hass_core.kernels.few_rows` serve `rows` rows like x."""
    return rows in FEW_ROWS and x.dtype in SIXTEEN_BITS and kernels.usable(x)


def packable(weight: Tensor) -> bool:
    """Whether this processor has blocked products for the weight's type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
