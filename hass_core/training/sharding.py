"""How training is spread over processes: the weights whole on each (DDP), or divided among them (FSDP2).

`accelerate launch` says which, by the `distributed_type` of its configuration. accelerate wraps for DDP. Dividing is
torch's own `fully_shard`, which works on CPUs too: a weight is then a DTensor, gathered while the alignment runs
forward and backward, and a share of it everywhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def distribute(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The module to call in training. Its parameters may be other objects afterwards: make optimizers from those."""
    if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return accelerator.prepare(module)
    fully_shard(module, mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
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
