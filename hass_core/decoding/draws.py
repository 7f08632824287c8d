"""What drawing tokens needs on the device: the coins by position, and the tokens seen for the repetition penalty.

Shapes: B rows, n draws a row, N tree nodes, R tokens emitted, V vocabulary.
"""

import torch
from torch import Tensor

from hass_core.config import SamplingConfig
from hass_core.decoding.sampling import draw, position_coins
from hass_core.decoding.tree import Tree


class Draws:
    """B rows under one sampling setting; `start` loads new prompts into the same memory."""

    def __init__(self, sampling: SamplingConfig, rows: int, max_tokens: int, vocab_size: int, device: torch.device):
        self._sampling = sampling
        self._coins = torch.zeros(rows, max_tokens, dtype=torch.float64, device=device)
        self._first_position = torch.zeros(rows, dtype=torch.long, device=device)
        penalized = sampling.repetition_penalty != 1
        self._seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device) if penalized else None

    def start(self, token_ids: Tensor, lengths: Tensor, seed: int) -> None:
        """Begin with prompts [B, L] of `lengths` [B] tokens."""
        self._first_position.copy_(lengths)
        if self._sampling.temperature > 0:
            rows, count = self._coins.shape
            self._coins.copy_(torch.stack([position_coins(seed, row, count) for row in range(rows)]))
        if self._seen is not None:
            self._seen.zero_()
            self.note(token_ids, lengths)

    def draw(self, logits: Tensor, positions: Tensor, tree: Tree | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, n] for sequence `positions` [B, n] and whether they are sound, from logits [B, n, V]."""
        place = (positions - self._first_position[:, None]).clamp(0, self._coins.shape[1] - 1)
        return draw(logits, self._sampling, self._coins.gather(1, place), self._seen_at(tree))

    def note(self, token_ids: Tensor, counts: Tensor) -> None:
        """Remember tokens [B, R], the first `counts` [B] of each row."""
        if self._seen is not None:
            live = torch.arange(token_ids.shape[1], device=token_ids.device) < counts[:, None]
            self._seen.scatter_(1, torch.where(live, token_ids, token_ids[:, :1]), True)

    def _seen_at(self, tree: Tree | None) -> Tensor | None:
        """[B, n, V]: tokens of the sequence before each draw; at a tree's node those of its path too."""
        if self._seen is None or tree is None:
            return None if self._seen is None else self._seen[:, None]
        path = torch.where(tree.visible, tree.token_ids[:, None, :], tree.token_ids[:, :, None])
        return self._seen[:, None].repeat(1, path.shape[1], 1).scatter_(2, path, True)
