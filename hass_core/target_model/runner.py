"""Run a target's transformer over a static key-value cache and get its features, the states its head takes.

`make_runner` picks the runner: `FusedRunner` for the Llama family, `HFRunner` for any other causal language model.
"""

from typing import Protocol

import torch
from torch import Tensor

from hass_core.errors import TargetError
from hass_core.target_model.fused import FusedRunner
from hass_core.target_model.generic import HFRunner
from hass_core.target_model.kv_cache import FixedShapes, KVCache
from hass_core.target_model.loader import Target


class Runner(Protocol):
    """What a decoder needs of a target. B batch, T new tokens, H hidden, V vocabulary."""

    hidden_size: int
    vocab_size: int
    context_tokens: int
    device: torch.device
    dtype: torch.dtype
    capturable: bool  # a pass of fixed shapes can go into a CUDA graph

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """An empty cache for rows of up to `max_tokens` tokens."""
        ...

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        cache: KVCache,
        visible: Tensor | None = None,
        fixed: FixedShapes | None = None,
    ) -> Tensor:
        """Features after the final norm [B, T, H] of new tokens [B, T] at `position_ids` [B, T].

        Their keys and values go into the slots behind each row's live length, which stays as it is: `cache.advance`
        makes them live. Each token sees its row's live slots, and of the new tokens those up to itself or those that
        the tree attention mask `visible` [B, T, T] says. With `fixed`, nothing depends on what the host knows of the
        lengths.
        """
        ...

    def logits(self, features: Tensor) -> Tensor:
        """[..., V] from features [..., H]."""
        ...


def make_runner(target: Target) -> Runner:
    """The fastest runner that computes this target exactly. Raises TargetError for one on several GPUs."""
    if target.is_spread:
        raise TargetError(
            f"the target {target.name} lies on several GPUs, which gives features only: load it on one to decode, or "
            'have a server answer (responses.engine="openai")'
        )
    return FusedRunner(target) if FusedRunner.supports(target.model) else HFRunner(target)
