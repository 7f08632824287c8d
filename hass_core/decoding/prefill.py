"""Read prompts into a cache, in pieces so that the attention mask of a long prompt stays small."""

import torch
from torch import Tensor

from hass_core.target_model.kv_cache import KVCache
from hass_core.target_model.runner import Runner

TOKENS_PER_PIECE = 512


def pieces(lengths: list[int]) -> list[tuple[int, int, list[int]]]:
    """(start, stop, live tokens of each row) for rows of `lengths` tokens."""
    cuts = range(0, max(lengths), TOKENS_PER_PIECE)  # none for rows of no tokens
    return [
        (start, stop, [max(0, min(length, stop) - start) for length in lengths])
        for start, stop in ((cut, min(cut + TOKENS_PER_PIECE, max(lengths))) for cut in cuts)
    ]


def prefill(runner: Runner, token_ids: Tensor, lengths: list[int], cache: KVCache) -> Tensor:
    """Features [B, L, H] of right-padded prompts [B, L]; the cache then holds `lengths` tokens a row."""
    features = []
    for start, stop, live in pieces(lengths):
        position_ids = torch.arange(start, stop, device=token_ids.device).expand(len(lengths), -1)
        features.append(runner.forward(token_ids[:, start:stop], position_ids, cache))
        cache.advance(live)
    return torch.cat(features, 1)


def padded(rows: list[list[int]], device: torch.device) -> Tensor:
    """[B, L] with zeros behind shorter rows."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def last_of(rows: Tensor, counts: Tensor) -> Tensor:
    """[B, H]: of each row of [B, L, H] the element before `counts` [B]."""
    return rows.gather(1, (counts - 1)[:, None, None].expand(-1, 1, rows.shape[2]))[:, 0]
