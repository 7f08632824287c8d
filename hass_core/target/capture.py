"""Capture features: the target's hidden state after its final norm, for given token ids, without computing logits."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hass_core.errors import NonFinite
from hass_core.target.loader import Target


def batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices grouped so that rows × longest row stays within `max_tokens`, longest first, so padding is small."""
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * longest > max_tokens:
            yield batch
            batch = []
        longest = longest if batch else lengths[index]
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def capture_features(
    target: Target, token_ids: Sequence[Sequence[int]], names: Sequence[str] | None = None
) -> list[Tensor]:
    """Features [L_i, H] of each row, bfloat16 on the CPU; row t is what the head turns into the next token of x_{≤t}.

    Rows are padded on the right. Attention is causal, so padding reaches no real token and needs no mask.
    Raises NonFinite with the row's name, else its index.
    """
    longest = max(map(len, token_ids))
    padded = torch.zeros(len(token_ids), longest, dtype=torch.long)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    decoder = cast(Any, target.model).base_model
    hidden = decoder(input_ids=padded.to(target.device), use_cache=False).last_hidden_state
    finite = hidden.isfinite().all(-1).cpu()
    features = hidden.to(torch.bfloat16).cpu()
    rows = []
    for i, ids in enumerate(token_ids):
        if not bool(finite[i, : len(ids)].all()):
            row = f"conversation {names[i]}" if names else f"row {i}"
            raise NonFinite(f"{row}: the target's hidden states are NaN or infinite; load the target in float32")
        rows.append(features[i, : len(ids)])
    return rows
