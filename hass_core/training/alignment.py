"""Harmonized context alignment (HASS, arXiv 2408.15766, section 3.2) in its anchor-frame form.

While decoding, the j-th token of a drafted chain is predicted from j - 1 features that the draft itself made. Training
reproduces that: each row r is the anchor of a chain whose last verified feature is f_r, and alignment step j runs the
chain's j-th forward pass for all anchors at once:

    step 1   input (f_r, x_{r+1}) at position r;          sees the verified rows up to r
    step j   input (f̂_{r+j-1}, x_{r+j}) at position r+j-1; sees the same rows and its own chain's steps 2..j

f̂ is the output of step j - 1 at the same anchor, without gradient (HASS) or with it. Keys and values of the verified
rows are computed once, so a step costs one causal attention whatever its number.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hass_core.model.draft import DraftModel
from hass_core.target.compiling import compiled
from hass_core.training.attention import attend
from hass_core.training.batch import Batch


class Alignment(nn.Module):
    """The n-step forward pass of training, as a module so that accelerate can wrap it."""

    def __init__(self, draft: DraftModel, align_steps: int, detach_features: bool = True, recompute: bool = False):
        super().__init__()
        self.draft = draft
        self.align_steps = align_steps
        self.detach_features = detach_features
        self.recompute = recompute

    def forward(self, batch: Batch, features: Tensor) -> list[Tensor]:
        """For each step j = 1..n the estimates of f_{r+j} at all anchors r, [Q, H].

        `features` [N, H] are the input features of all rows: the batch's, perhaps with noise.
        """
        last = len(batch.token_ids) - 1
        next_tokens = batch.token_ids[(torch.arange(len(features), device=features.device) + 1).clamp(max=last)]
        enter, output = self._parts()
        u, queries, keys, values = enter(next_tokens, features, batch.position_ids)
        u, queries = u[batch.anchors], queries[:, batch.anchors]
        attended = attend(queries, keys, values, [], [], batch.documents)
        outputs = [output(u, attended)]

        own_keys: list[Tensor] = []
        own_values: list[Tensor] = []
        positions = batch.position_ids[batch.anchors]
        for step in range(2, self.align_steps + 1):
            previous = outputs[-1].detach() if self.detach_features else outputs[-1]
            tokens = batch.token_ids[(batch.anchors + step).clamp(max=last)]
            u, queries, key, value = enter(tokens, previous, positions + step - 1)
            own_keys.append(key)
            own_values.append(value)
            attended = attend(queries, keys, values, own_keys, own_values, batch.documents)
            outputs.append(output(u, attended))
        return outputs

    def _parts(self) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[[Tensor, Tensor], Tensor]]:
        """What stands before and behind the attention. With `recompute` they keep their inputs only, and the backward
        pass runs them again: a step then keeps a quarter of its activations, the attention's."""
        if not self.recompute:
            return self._enter, self._output
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in them is random
        return partial(again, self._enter), partial(again, self._output)  # pyright: ignore[reportReturnType]

    def compile_parts(self) -> None:
        """Compile what lies between the attentions, whose kernels are compiled already."""
        self._enter = compiled(self._enter, any_shape=True)
        self._output = compiled(self._output, any_shape=True)

    def _enter(self, token_ids: Tensor, features: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """u [R, H], queries [A, R, d], keys and values [KV, R, d] of R rows."""
        return tuple(x[0] for x in self.draft.enter(token_ids[None], features[None], position_ids[None]))

    def _output(self, u: Tensor, attended: Tensor) -> Tensor:
        """The features [R, H] that R rows estimate."""
        return self.draft.output(u[None], attended[None])[0]
