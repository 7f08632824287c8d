"""The likeliest tokens of many distributions: by one kernel on a GPU, by torch.topk elsewhere."""

from torch import Tensor

from hass_core import kernels


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and indices [..., k] of the k likeliest tokens of logits [..., V], best first.

    A log-probability is NaN where a logit of its row is NaN or +infinite.
    """
    if kernels.usable(logits):
        from hass_core.kernels.top_k import row_top_k  # Triton is there on a GPU only

        top, index, lse = row_top_k(logits.flatten(0, -2), k)
        return (top - lse[:, None]).view(*logits.shape[:-1], k), index.view(*logits.shape[:-1], k)
    top, index = logits.topk(k, dim=-1)
    return (top.float() - logits.float().logsumexp(-1, keepdim=True)), index
