"""Harmonized context alignment (HASS, arXiv 2408.15766, section 3.2) in its anchor-frame form.

While decoding, the j-th token of a drafted chain is predicted from j - 1 features that the draft itself made. Training
reproduces that: each row r is the anchor of a chain whose last verified feature is f_r, and alignment step j runs the
chain's j-th forward pass for all anchors at once:

    step 1   input (f_r, x_{r+1}) at position r;          sees the verified rows up to r
    step j   input (f̂_{r+j-1}, x_{r+j}) at position r+j-1; sees the same rows and its own chain's steps 2..j

f̂ is the output of step j - 1 at the same anchor, without gradient (HASS) or with it; of a draft that estimates no
feature, the state that stands for one. Keys and values of the verified rows are computed once, so a step costs one
causal attention whatever its number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hass_core.draft_model.layers import DraftModel
from hass_core.target_model.compiling import compiled
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

    def forward(self, batch: Batch, features: Tensor, with_head: bool = False) -> list[Tensor]:
        """For each step j = 1..n what a head reads of the estimates of f_{r+j} at all anchors r, [Q, H].

        `features` [N, H] are the input features of all rows: the batch's, perhaps with noise; of a draft that fuses
        states of the target those, [N, n·H]. `with_head`: after those
        comes the weight [D, H] of the draft's own head, where it has one, so that its gradient, too, goes through
        whatever accelerate wraps around this.
        """
        output, keys, values = self._maybe_again(self._first, batch, self.draft.features_from(features))
        outputs, own = [output], []
        again = OwnAgain(partial(self._own_of, batch, outputs), features.device.type)
        for step in range(2, self.align_steps + 1):
            with again.instead_of(own) if self.recompute else nullcontext():
                output, *new = self._maybe_again(self._later, batch, step, outputs[-1], keys, values, *own)
            outputs.append(output)
            own += new
        return [*map(self.draft.read, outputs), *(self.draft.own_head() if with_head else ())]

    def _maybe_again(self, step: Callable[..., tuple[Tensor, ...]], *inputs: Any) -> tuple[Tensor, ...]:
        """A step's results. With `recompute` nothing else of it is kept, and the backward pass runs it again: of all
        steps' activations only one step's are there at a time."""
        if not self.recompute:
            return step(*inputs)
        # nothing in a step is random
        return checkpoint(step, *inputs, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]

    def _first(self, batch: Batch, features: Tensor) -> tuple[Tensor, ...]:
        """Step 1: its estimates [Q, H], and keys and values [KV, N, d] of the verified rows."""
        next_rows = (torch.arange(len(features), device=features.device) + 1).clamp(max=len(batch.token_ids) - 1)
        residual, queries, keys, values = self._enter(batch.token_ids[next_rows], features, batch.position_ids)
        attended = attend(queries[:, batch.anchors], keys, values, [], [], batch.documents)
        return self._output(residual[batch.anchors], attended), keys, values

    def _later(
        self, batch: Batch, step: int, previous: Tensor, keys: Tensor, values: Tensor, *own: Tensor
    ) -> tuple[Tensor, ...]:
        """Step `step`: its estimates [Q, H], and its own key and value [KV, Q, d]. `own` holds those of the steps
        before it: key, value, key, …"""
        residual, queries, key, value = self._enter(*self._chain_inputs(batch, step, previous))
        attended = attend(queries, keys, values, [*own[::2], key], [*own[1::2], value], batch.documents)
        return self._output(residual, attended), key, value

    def _own_of(self, batch: Batch, outputs: list[Tensor], step: int) -> tuple[Tensor, ...]:
        """The own key and value [KV, Q, d] of a step, from the estimates of all steps."""
        return self._enter(*self._chain_inputs(batch, step, outputs[step - 2].detach()))[2:]

    def _chain_inputs(self, batch: Batch, step: int, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [Q], features [Q, H] and positions [Q] of a step's rows."""
        tokens = batch.token_ids[(batch.anchors + step).clamp(max=len(batch.token_ids) - 1)]
        features = previous.detach() if self.detach_features else previous
        return tokens, features, batch.position_ids[batch.anchors] + step - 1

    def compile_parts(self) -> None:
        """Compile what lies between the attentions, whose kernels are compiled already."""
        self._enter = compiled(self._enter, any_shape=True)
        self._output = compiled(self._output, any_shape=True)

    def _enter(self, token_ids: Tensor, features: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """What the layer adds to [R, H], queries [A, R, d], keys and values [KV, R, d] of R rows."""
        return tuple(x[0] for x in self.draft.enter(token_ids[None], features[None], position_ids[None]))

    def _output(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The features [R, H] that R rows estimate, or the states that stand for them."""
        return self.draft.output(residual[None], attended[None])[0]


class OwnAgain:
    """Own keys and values of a chain's steps, made again for the backward pass instead of kept until then.

    Every later step needs them a second time when it is run again, and the loss, whose logits are the most that is ever
    in memory, lies between. They are a small part of a step, and what they are made from is kept anyway.

    `make(step)` returns key and value of a step; it runs in the types that autocast chose when this was built.
    """

    def __init__(self, make: Callable[[int], tuple[Tensor, ...]], device_type: str):
        self._make = make
        self._made: dict[int, tuple[Tensor, ...]] = {}
        self._autocast = device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)

    @contextmanager
    def instead_of(self, own: Sequence[Tensor]) -> Iterator[None]:
        """What autograd saves within is made again where it is one of `own`: key and value of step 2, of step 3, …"""
        numbers = {tensor.data_ptr(): i for i, tensor in enumerate(own)}
        with saved_tensors_hooks(lambda saved: numbers.get(saved.data_ptr(), saved), self._unpacked):
            yield

    def _unpacked(self, saved: Tensor | int) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        before, which = divmod(saved, 2)
        if before not in self._made:
            with torch.enable_grad(), torch.autocast(*self._autocast):  # as in the step, so that one compilation serves
                self._made[before] = tuple(part.detach() for part in self._make(2 + before))
        return self._made[before][which]
