"""What stands before and behind a draft's layer while it decodes: the one part in which the two architectures differ.

Both take rows [B, T, 2H] of embeddings and features side by side. Formulas: `hass_core.draft_model.layers`.

Shapes: B batch, T rows, H hidden.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.draft_model.layers import DraftModel, Eagle3Model
from hass_core.target_model.block import Linear
from hass_core.target_model.compiling import compiled


class Ends(Protocol):
    """One architecture's."""

    def enter(self, inputs: Tensor, by_kernels: bool) -> tuple[Tensor, Tensor]:
        """What the layer adds to [B, T, H], and what its attention takes, of rows [B, T, 2H]."""
        ...

    def leave(self, out: Tensor) -> Tensor:
        """The states of the layer's outputs [B, T, H]."""
        ...

    def read(self, states: Tensor) -> Tensor:
        """What the head takes of states [..., H]."""
        ...


def ends_of(model: DraftModel, eight_bits: bool) -> Ends:
    """Those of a model, with the weights that it has now."""
    return Eagle3Ends(model) if isinstance(model, Eagle3Model) else FusedEnds(model, eight_bits)


class FusedEnds:
    """EAGLE's and HASS's: the fusion layer, and nothing behind."""

    def __init__(self, model: DraftModel, eight_bits: bool):
        self._fc = Linear(model.fc.weight, model.fc.bias, eight_bits)

    def enter(self, inputs: Tensor, by_kernels: bool) -> tuple[Tensor, Tensor]:
        u = self._fc.of_few_rows(inputs) if by_kernels else self._fc(inputs)
        return u, u

    def leave(self, out: Tensor) -> Tensor:
        return out

    def read(self, states: Tensor) -> Tensor:
        return states


class Eagle3Ends:
    """EAGLE-3's: a norm for each half, and one between a state and its reading."""

    def __init__(self, model: Eagle3Model):
        layer, architecture = model.layer, model.architecture
        self._norms = layer.input_layernorm.weight.detach(), layer.hidden_norm.weight.detach()
        self._last, self._eps = model.norm.weight.detach(), architecture.rms_norm_eps
        self._normed_state = architecture.norm_output
        self._halves = compiled(normed_halves, any_shape=True) if self._last.is_cuda else normed_halves

    def enter(self, inputs: Tensor, by_kernels: bool) -> tuple[Tensor, Tensor]:
        return self._halves(inputs, *self._norms, self._eps)

    def leave(self, out: Tensor) -> Tensor:
        return self._norm(out) if self._normed_state else out

    def read(self, states: Tensor) -> Tensor:
        return states if self._normed_state else self._norm(states)

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self._last, self._eps)


def normed_halves(inputs: Tensor, embedding_norm: Tensor, feature_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The features of rows [B, T, 2H], one row after the other, and both halves normed."""
    embedded, features = inputs.chunk(2, -1)
    shape = (features.shape[-1],)
    normed = F.rms_norm(embedded, shape, embedding_norm, eps), F.rms_norm(features, shape, feature_norm, eps)
    return features.contiguous(), torch.cat(normed, -1)
