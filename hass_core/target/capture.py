"""Capture features: the target's hidden state after its final norm, for given token ids, without computing logits."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hass_core.errors import NonFinite
from hass_core.target.loader import Target

TokenIds = Sequence[int] | np.ndarray  # of one row


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


def capture_features(target: Target, token_ids: Sequence[TokenIds], names: Sequence[str] | None = None) -> list[Tensor]:
    """Features [L_i, H] of each row, bfloat16 on the CPU; row t is what the head turns into the next token of x_{≤t}.

    Rows are padded on the right. Attention is causal, so padding reaches no real token and needs no mask.
    Raises NonFinite with the row's name, else its index.
    """
    return Capture(target, token_ids, names).rows()


class Capture:
    """`capture_features` under way: on a GPU, work for the next rows can be started before these are fetched."""

    @torch.no_grad()
    def __init__(self, target: Target, token_ids: Sequence[TokenIds], names: Sequence[str] | None = None):
        self._lengths, self._names = [len(ids) for ids in token_ids], names
        padded = np.zeros((len(token_ids), max(self._lengths)), np.int64)
        for row, ids in zip(padded, token_ids, strict=True):
            row[: len(ids)] = ids
        decoder = cast(Any, target.model).base_model
        hidden = decoder(input_ids=_sent(torch.from_numpy(padded), target.device), use_cache=False).last_hidden_state
        self._finite, self._features = _fetched(hidden.isfinite().all(-1)), _fetched(hidden.to(torch.bfloat16))
        self._copied = torch.cuda.Event() if hidden.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def rows(self) -> list[Tensor]:
        """The rows, once they are here; see `capture_features`."""
        if self._copied is not None:
            self._copied.synchronize()
        for i, length in enumerate(self._lengths):
            if not bool(self._finite[i, :length].all()):
                row = f"conversation {self._names[i]}" if self._names else f"row {i}"
                raise NonFinite(f"{row}: the target's hidden states are NaN or infinite; load the target in float32")
        return [features[:length] for features, length in zip(self._features, self._lengths, strict=True)]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; to a GPU from page-locked memory, else the copy would wait for the work given before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _fetched(tensor: Tensor) -> Tensor:
    """On the CPU; from a GPU into page-locked memory, in the background."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
