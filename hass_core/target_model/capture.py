"""Capture features: the target's hidden state after its final norm, for given token ids, without computing logits.

With `taps` the states after those layers follow it in every row: H numbers become (1 + n)·H.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hass_core.errors import NonFinite
from hass_core.target_model.loader import Target
from hass_core.target_model.packed import packed_pass
from hass_core.target_model.taps import Taps, listening

TokenIds = Sequence[int] | np.ndarray  # of one row


def batches_for(target: Target, lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows that this target takes in one pass: up to `max_tokens`, padding included where it pads."""
    return batches_by_tokens(lengths, max_tokens, padded=packed_pass(target) is None)


def batches_by_tokens(lengths: Sequence[int], max_tokens: int, padded: bool = True) -> Iterator[list[int]]:
    """Indices grouped so that rows × longest row, or their sum where not `padded`, stays within `max_tokens`.

    Longest first, so padding is small. A row that is longer by itself is a batch of its own.
    """
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        added = lengths[batch[0] if batch and padded else index]
        if batch and tokens + added > max_tokens:
            yield batch
            batch, tokens, added = [], 0, lengths[index]
        tokens += added
        batch.append(index)
    if batch:
        yield batch


def capture_features(
    target: Target, token_ids: Sequence[TokenIds], names: Sequence[str] | None = None, taps: Sequence[int] = ()
) -> list[Tensor]:
    """Features [L_i, (1 + n)·H] of each row, bfloat16 on the CPU; the first H of row t are what the head turns into the
    next token of x_{≤t}, after them the states after the layers `taps`.

    Raises NonFinite with the row's name, else its index.
    """
    return Capture(target, token_ids, names, taps).rows()


class Capture:
    """`capture_features` under way: on a GPU, work for the next rows can be started before these are fetched."""

    @torch.no_grad()
    def __init__(
        self,
        target: Target,
        token_ids: Sequence[TokenIds],
        names: Sequence[str] | None = None,
        taps: Sequence[int] = (),
    ):
        self._lengths, self._names = [len(ids) for ids in token_ids], names
        packed, tapped = packed_pass(target), Taps(taps) if taps else None
        hidden = packed(token_ids, tapped) if packed else _padded_pass(target, token_ids, self._lengths, tapped)
        if tapped:
            hidden = torch.cat([hidden, tapped.joined()], -1)
        self._is_padded = packed is None
        here = _Fetching(hidden.isfinite().all(-1), hidden.to(torch.bfloat16))
        self._finite, self._features = here.tensors
        self._wait = here.wait

    def rows(self) -> list[Tensor]:
        """The rows, once they are here; see `capture_features`."""
        self._wait()
        if not bool(self._finite.all()):  # of a row, or of padding, which is nobody's
            for i, finite in enumerate(self._each(self._finite)):
                if not bool(finite.all()):
                    row = f"conversation {self._names[i]}" if self._names else f"row {i}"
                    raise NonFinite(
                        f"{row}: the target's hidden states are NaN or infinite; load the target in float32"
                    )
        return self._each(self._features)

    def _each(self, tensor: Tensor) -> list[Tensor]:
        if self._is_padded:
            return [row[:length] for row, length in zip(tensor, self._lengths, strict=True)]
        return list(tensor.split(self._lengths))


def _padded_pass(target: Target, token_ids: Sequence[TokenIds], lengths: list[int], taps: Taps | None) -> Tensor:
    """Hidden states [B, longest, H] by the model's own pass.

    Rows are padded on the right. Attention is causal, so padding reaches no real token and needs no mask.
    """
    padded = np.zeros((len(token_ids), max(lengths)), np.int64)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    decoder = cast(Any, target.model).base_model
    with listening(target.model, target.num_layers, taps, target.device):
        out = decoder(input_ids=_sent(torch.from_numpy(padded), target.device), use_cache=False)
    return out.last_hidden_state


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; to a GPU from page-locked memory, else the copy would wait for the work given before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class _Fetching:
    """Tensors on their way to the CPU; from a GPU into page-locked memory, beside the work given to it afterwards."""

    def __init__(self, *tensors: Tensor):
        self.tensors, self._copied = tensors, None
        if not tensors[0].is_cuda:
            return
        stream = _copying_stream(tensors[0].device)
        stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
        with torch.cuda.stream(stream):
            self.tensors = tuple(_page_locked(tensor).copy_(tensor, non_blocking=True) for tensor in tensors)
            self._copied = stream.record_event()
        for tensor in tensors:
            tensor.record_stream(stream)  # its memory is not another's until it has been copied

    def wait(self) -> None:
        """Until they are there."""
        if self._copied is not None:
            self._copied.synchronize()


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _page_locked(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
