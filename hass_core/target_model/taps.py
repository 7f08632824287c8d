"""The states inside a target that a draft may read beside the last one: the residual stream after some of its layers.

Layer numbers count as vLLM's: k is the state after k layers. A runner that is given `Taps` hands them over on its way;
without, nothing is kept. A model of transformers is listened to by hooks on its layers.

Shapes: B batch, T tokens, H hidden, n taps.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hass_core.errors import TargetError
from hass_core.target_model.loader import Target

PROBED_TOKENS = 4

_listening = threading.Lock()  # one pass that is listened to at a time; those of other threads go on unheard


class Taps:
    """Collects the states of one pass after `layers`, ascending."""

    def __init__(self, layers: Sequence[int]):
        self.layers = tuple(layers)
        self._states: dict[int, Tensor] = {}

    def see(self, layer: int, state: Tensor) -> None:
        """`state` [..., H] is what `layer` layers have made."""
        if layer in self.layers:
            self._states[layer] = state

    def joined(self) -> Tensor:
        """[..., n·H]: the states side by side, in the order of `layers`."""
        return torch.cat([self._states[layer] for layer in self.layers], -1)


def check_taps(target: Target, layers: Sequence[int]) -> None:
    """Raise TargetError where the states after these layers, which the target has, cannot be had: unless it has one
    list of layers that each return one state [B, T, H]."""
    if not layers:
        return
    hidden, taps = target.embedding.shape[1], Taps(layers)
    token_ids = torch.arange(1, 1 + PROBED_TOKENS, device=target.device)[None]
    with torch.no_grad(), listening(target.model, target.num_layers, taps, target.device):
        cast(Any, target.model).base_model(input_ids=token_ids, use_cache=False)
    heard = {layer: tuple(state.shape) for layer, state in taps._states.items()}
    if heard != dict.fromkeys(layers, (1, PROBED_TOKENS, hidden)):
        raise TargetError(
            f"draft.taps: the layers of {target.name} do not hand on one state of {hidden} numbers a token: they gave "
            f"{heard}; leave draft.taps out for a draft of the last state"
        )


@contextmanager
def listening(model: PreTrainedModel, count: int, taps: Taps | None, device: torch.device) -> Iterator[None]:
    """While a model of `count` layers runs its own pass within, `taps` hear it; the states come to `device`.

    Raises TargetError where its layers are not to be found.
    """
    if taps is None:
        yield
        return
    layers, listener = _layers(model, count), threading.get_ident()

    def hear(number: int) -> Any:
        def ran(module: nn.Module, inputs: Any, output: Any) -> None:
            if threading.get_ident() == listener:
                state = output[0] if isinstance(output, tuple) else output
                taps.see(number, state.to(device, non_blocking=True))

        return ran

    with _listening:
        hooks = [layers[number - 1].register_forward_hook(hear(number)) for number in taps.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _layers(model: PreTrainedModel, count: int) -> nn.ModuleList:
    """The model's decoder layers: the one list of so many modules that stands nearest to its body."""
    body = cast(nn.Module, model.base_model)
    lists = [
        (name.count("."), m) for name, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count
    ]
    nearest = min((depth for depth, _ in lists), default=0)
    found = [modules for depth, modules in lists if depth == nearest]
    if len(found) != 1:
        raise TargetError(
            f"draft.taps: {len(found)} lists of {count} layers were found in a {model.config.model_type} model, one is "
            "needed to take states after some of them; leave draft.taps out for a draft of the last state"
        )
    return found[0]
