"""A matrix product whose weight is laid out once for the processor it runs on.

On a CPU oneDNN re-orders a weight into blocks on every call unless it is handed one already in blocks: packing made
SmolLM2-135M's token 1.5 times faster in bfloat16, and a tree of 8 tokens 1.6 times faster in float32. The blocks are a
copy, so on a CPU decoding needs the weights' memory a second time. On a GPU the weight itself is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def packable(weight: Tensor) -> bool:
    """Whether this processor has blocked products for the weight's type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
