"""How training is spread over processes: the weights whole on each (DDP), or divided among them (FSDP2).

`accelerate launch` says which, by the `distributed_type` of its configuration. accelerate wraps for DDP. Dividing is
torch's own `fully_shard`, which works on CPUs too: a weight is then a DTensor, gathered while the alignment runs
forward and backward, and a share of it everywhere else. A captured step cannot have DDP's exchange of gradients within;
it has one of its own, after the backward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def make_accelerator(device: torch.device) -> Accelerator:
    """accelerate on this kind of device. DDP exchanges gradients only: the module's buffers, the target's embedding
    among them, are frozen, and would else be sent from the first process to all others at every step."""
    settings = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=[settings])


def distribute(module: nn.Module, accelerator: Accelerator, captured: bool = False) -> nn.Module:
    """The module to call in training. Its parameters may be other objects afterwards: make optimizers from those."""
    if captured:
        return _equal_everywhere(module.to(accelerator.device), accelerator)
    if not _divides(accelerator):
        return accelerator.prepare(module)
    fully_shard(module, mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
    return module


def can_be_captured(accelerator: Accelerator) -> bool:
    """Whether a step may be a CUDA graph: on GPUs that each hold all weights."""
    return accelerator.device.type == "cuda" and not _divides(accelerator)


def average(tensors: Sequence[Tensor], accelerator: Accelerator) -> None:
    """The tensors, of one type, become the mean of all processes', in a single exchange."""
    if accelerator.num_processes > 1:
        together = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(together)
        together.div_(accelerator.num_processes)
        parts = together.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def own_share(items: Sequence[T], accelerator: Accelerator | None) -> Sequence[T]:
    """This process's part of work that any of them could do."""
    return items[accelerator.process_index :: accelerator.num_processes] if accelerator else items


def total(tensor: Tensor, accelerator: Accelerator | None) -> Tensor:
    """The sum of all processes' tensors, on each of them."""
    if accelerator is None or accelerator.num_processes == 1:
        return tensor
    summed = tensor.clone()
    torch.distributed.all_reduce(summed)
    return summed


def as_first_process(value: T, accelerator: Accelerator) -> T:
    """The first process's `value`, on all of them: what it decides is then decided alike."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def _divides(accelerator: Accelerator) -> bool:
    return accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def _equal_everywhere(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    if accelerator.num_processes > 1:
        for parameter in module.parameters():
            torch.distributed.broadcast(parameter.detach(), src=0)
    return module


@contextmanager
def unsynced(wrapped: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Backward passes that add to the gradients without exchanging them: all micro-batches of a step but the last."""
    if not isinstance(wrapped, FSDPModule):
        with accelerator.no_sync(wrapped):
            yield
        return
    wrapped.set_requires_gradient_sync(False)
    yield
    wrapped.set_requires_gradient_sync(True)


@contextmanager
def gathered(wrapped: nn.Module) -> Iterator[None]:
    """The module's parameters are whole, to run parts of it without gradient; by all processes at once."""
    if isinstance(wrapped, FSDPModule):
        wrapped.unshard()
    yield
    if isinstance(wrapped, FSDPModule):
        wrapped.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor put together, by all processes at once; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's share of a tensor that all processes hold, where `other`, of the same shape, is divided."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
