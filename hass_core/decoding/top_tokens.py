"""The likeliest tokens of many distributions: by one kernel on a GPU, by torch.topk elsewhere."""

from torch import Tensor

from hass_core import kernels


def top_tokens(logits: Tensor, k: int, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities, at most 0, and indices [..., k] of the k likeliest tokens of logits [..., V], best first; with
    `token_ids` [V], those instead of the indices.

    A log-probability is NaN where a logit of its row is NaN or +infinite.
    """
    if kernels.usable(logits):
        from hass_core.kernels.top_k import row_top_k  # Triton is there on a GPU only

        scores, index = row_top_k(logits.flatten(0, -2), k, token_ids)
        return scores.view(*logits.shape[:-1], k), index.view(*logits.shape[:-1], k)
    top, index = logits.topk(k, dim=-1)
    scores = (top.float() - logits.float().logsumexp(-1, keepdim=True)).clamp(max=0)
    return scores, index if token_ids is None else token_ids[index]
