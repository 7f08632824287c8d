"""Rotary positions by table.

Rotation is x·cos + roll(x, d/2)·sin with the first half of sin negated: the same products as rotate-half.
"""

import math

import torch
from torch import Tensor, nn

LENGTH_DEPENDENT = ("dynamic", "longrope")  # their frequencies change with the sequence: no table holds them


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x [B, T, heads, d] turned by their positions' cosines and signed sines [B, T, 1, d]."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class RopeTable:
    """Cosines and signed sines by position, from transformers' rotary embedding, so every scaling type is covered."""

    def __init__(self, rotary: nn.Module, device: torch.device, dtype: torch.dtype):
        self._rotary = rotary
        self._like = torch.zeros(1, device=device, dtype=dtype)
        self.fixed = getattr(rotary, "rope_type", "default") not in LENGTH_DEPENDENT
        self._table = self._compute(torch.arange(1, device=device)[None])[0]
        self._outgrown: list[Tensor] = []  # captured graphs still read them

    def at(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors [B, T, 1, d] for positions [B, T]."""
        both = self._table[position_ids] if self.fixed else self._compute(position_ids)
        return both[:, :, :1], both[:, :, 1:]

    def grow(self, positions: int) -> None:
        """Let the table hold at least `positions` positions."""
        if self.fixed and len(self._table) < positions:
            rounded = 1 << math.ceil(math.log2(positions))
            self._outgrown.append(self._table)
            self._table = self._compute(torch.arange(rounded, device=self._like.device)[None])[0]

    def _compute(self, position_ids: Tensor) -> Tensor:
        """[B, T, 2, d]: cosines and signed sines side by side, so that one look-up finds both."""
        cos, sin = self._rotary(self._like, position_ids)
        half = sin.shape[-1] // 2
        return torch.stack([cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)], dim=2)
