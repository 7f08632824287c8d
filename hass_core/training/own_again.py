"""Own keys and values of a chain's steps, made again for the backward pass instead of kept until then.

Every later step needs them a second time when it is run again, and the loss, whose logits are the most that is ever in
memory, lies between. They are a small part of a step, and what they are made from is kept anyway.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class OwnAgain:
    """`make(step)` returns key and value of a step; it runs in the types that autocast chose when this was built."""

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
