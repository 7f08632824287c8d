"""Drawing for rows that each have sampling settings of their own, as the answering engine does.

Shapes: B rows, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hass_core import kernels
from hass_core.sampling.noise import winner
from hass_core.sampling.processors import COLDEST, NEVER, greedy, nucleus_edge


def as_signed(row_streams: list[tuple[int, int]]) -> Tensor:
    """[B, 2] int32 of the words of streams."""
    return torch.from_numpy(np.array(row_streams, np.uint32).view(np.int32))


class Shaped(NamedTuple):
    """What rows with settings of their own are drawn from."""

    logits: Tensor  # [B, V] float32, divided by the temperature
    lowest: Tensor | None  # [B, 1] only logits from there on count
    cold: Tensor  # [B] rows that take the likeliest


def shape_rows(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, max_top_k: int, use_top_p: bool
) -> Shaped:
    """The processors on logits [B, V], each row with settings [B] of its own.

    top_k 0 and top_p 1 switch a row's filter off. `max_top_k` (0 = none) and `use_top_p` say on the host what the
    rows use at most, so that the common unfiltered case costs nothing.
    """
    cold = temperature < COLDEST
    shaped = logits.float() * torch.where(cold, 1.0, 1 / temperature)[:, None]
    lowest = None
    if max_top_k:
        kth = shaped.topk(max_top_k, dim=-1).values.gather(1, (top_k - 1).clamp(min=0)[:, None])
        lowest = torch.where((top_k > 0)[:, None], kth, NEVER)
    if use_top_p:
        kept = shaped if lowest is None else shaped.masked_fill(shaped < lowest, NEVER)
        share = torch.where(top_p < 1, top_p, 0.0)[:, None]
        nucleus = torch.where(share > 0, nucleus_edge(kept, share), NEVER)
        lowest = nucleus if lowest is None else torch.maximum(lowest, nucleus)
    return Shaped(shaped, lowest, cold)


def draw_rows(shaped: Shaped, streams: Tensor, positions: Tensor) -> Tensor:
    """Token ids [B] drawn at `positions` [B], with the noise of a stream [B, 2] for each row."""
    logits, lowest, cold = shaped
    if kernels.usable(logits):
        from hass_core.kernels.top_k import RowNoise, row_top_k  # Triton is there on a GPU only

        drawn = row_top_k(logits, 1, None, RowNoise(streams, positions, 0, 1.0, 1.0, lowest))[1][:, 0]
        return torch.where(cold, greedy(logits)[0], drawn)
    if lowest is not None:
        logits = logits.masked_fill(logits < lowest, NEVER)
    words = [(low, high) for low, high in streams.cpu().numpy().view(np.uint32).tolist()]
    rows = zip(logits.cpu().numpy(), words, positions.tolist(), cold.tolist(), strict=True)
    drawn = [int(row.argmax()) if is_cold else winner(row, word, place) for row, word, place, is_cold in rows]
    return torch.tensor(drawn, device=logits.device)
