"""One optimizer step: micro-batches forward and backward, the gradients' sum over processes, the update.

    counts      the supervised tokens of the whole step, over all processes: what every mean divides by
    backward    for each micro-batch the alignment, the loss and its gradient; gradients accumulate
    update      refused when anything is not finite; clipped; then the optimizers, by the schedule's learning rate, and
                the moving average of the weights

On a GPU a micro-batch's forward and backward pass is one CUDA graph for each shape of batch. Eagerly it is some 1,500
calls from Python, which on a small draft take longer than what they start. A graph reads its batch from tensors of its
own and adds to the gradients where they are, so those must stay: they are set to zero, not to None.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from hass_core.config import TrainingConfig
from hass_core.cuda_graphs import GraphCache
from hass_core.draft_model.eagle3 import LM_HEAD
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.errors import NonFinite
from hass_core.target_model.loader import choose_dtype
from hass_core.training.alignment import Alignment
from hass_core.training.attention import FLASH_DTYPES
from hass_core.training.batch import Batch, add_noise
from hass_core.training.losses import PARTS, Objective, distill
from hass_core.training.sharding import average, can_be_captured, distribute, unsynced, whole

MOST_GRAPHS = 12  # batches of still other shapes run eagerly

Backward = Callable[[Batch, Tensor], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did; the same on all processes."""

    parts: Tensor  # [n, 5] the loss's parts, means over the step's supervised tokens
    gradient_norm: float
    tokens: int  # of the step's conversations
    stop: bool  # some process was asked to stop


@dataclass(frozen=True)
class Trainer:
    """A draft, and all that changes it. `wrapped` is the alignment as it is distributed over processes."""

    config: TrainingConfig
    seed: int
    accelerator: Accelerator
    alignment: Alignment
    wrapped: nn.Module
    head: DraftHead
    optimizers: list[Optimizer]
    average: "MovingAverage | None"
    dtype: torch.dtype
    captured: bool  # each micro-batch as a CUDA graph

    @classmethod
    def of(
        cls, config: TrainingConfig, seed: int, accelerator: Accelerator, draft: DraftModel, head: DraftHead,
        capture: bool = True,
    ) -> "Trainer":  # fmt: skip
        """Distribute the draft and make its optimizers. `capture`: steps may be CUDA graphs where that is possible."""
        alignment = Alignment(draft, config.align_steps, config.detach_features, config.recompute)
        if config.compile:
            alignment.compile_parts()
        dtype = compute_dtype(config.dtype, head.weight.device)
        graphs = capture and config.compile and can_be_captured(accelerator) and dtype in FLASH_DTYPES
        wrapped = distribute(alignment, accelerator, graphs)
        return cls(
            config=config,
            seed=seed,
            accelerator=accelerator,
            alignment=alignment,
            wrapped=wrapped,
            head=head,
            optimizers=make_optimizers(draft, config),
            average=MovingAverage(draft, config.ema_decay) if config.ema_decay else None,
            dtype=dtype,
            captured=graphs,
        )

    @property
    def draft(self) -> DraftModel:
        return self.alignment.draft

    @cached_property
    def objective(self) -> Objective:
        return Objective.from_config(self.config)

    @cached_property
    def backward(self) -> Backward:
        """Runs a micro-batch, adds to the gradients and returns its share of the loss's parts [n, 5]."""
        return GraphPerShape(self.backward_eagerly) if self.captured else self.backward_eagerly

    def backward_eagerly(self, batch: Batch, counts: Tensor) -> Tensor:
        with torch.autocast(batch.features.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outputs = self.wrapped(batch, batch.inputs.to(self.dtype), with_head=True)
        parts, gradients = distill(outputs, batch, self.head, self.objective, counts)
        torch.autograd.backward(outputs, gradients)
        return parts


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type to train in. `auto` is bfloat16 where the device has units for it, else float32: never float16, in
    which a token's share of the gradient, some 1e-8, would be zero."""
    dtype = choose_dtype(name, device)
    return torch.float32 if dtype == torch.float16 else dtype


def train_step(trainer: Trainer, batches: list[Batch], step: int, stop: bool = False) -> StepResult:
    """Take optimizer step `step` (from 0) on this process's micro-batches.

    `stop` is this process's wish to end; all learn of any's. Raises NonFinite, before the update, when the loss or the
    gradient is not finite.
    """
    accelerator, device = trainer.accelerator, trainer.head.weight.device
    counts, totals = _over_processes(batches, stop, accelerator, device)
    parts = torch.zeros(trainer.config.align_steps, len(PARTS), device=device)
    for number, batch in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else unsynced(trainer.wrapped, accelerator):
            moved = batch.to(device)
            if trainer.config.feature_noise:
                moved = add_noise(moved, trainer.config.feature_noise, trainer.seed, step, trainer.dtype)
            parts += trainer.backward(moved, counts)
    parameters = [p for p in trainer.alignment.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if trainer.captured:
        average([parts, *gradients], accelerator)
    else:
        parts = torch.as_tensor(accelerator.reduce(parts, "mean"))
    total_norm = whole(torch.nn.utils.get_total_norm(gradients))
    # the one moment a step waits for the device: after it the update runs while the next step is prepared
    outcome = torch.cat([total_norm.reshape(1).double(), totals.double(), parts.isfinite().all().reshape(1).double()])
    norm, tokens, stops, sound = outcome.tolist()
    if not (math.isfinite(norm) and sound):
        _refuse(batches, step, norm)
    _clip(trainer.config, parameters, total_norm)
    for optimizer in trainer.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=not trainer.captured)
    if trainer.average:
        trainer.average.update(trainer.draft, step)
    return StepResult(parts, norm, int(tokens), stops > 0)


def _over_processes(
    batches: list[Batch], stop: bool, accelerator: Accelerator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Supervised tokens of each alignment step [n] as a share for one process, since gradients are averaged over them;
    and the step's tokens and the number of processes that want to stop [2]. One exchange for all."""
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    own = torch.tensor([sum(batch.num_tokens for batch in batches), int(stop)])
    summed = torch.as_tensor(accelerator.reduce(torch.cat([counts, own]).to(device), "sum"))
    return summed[:-2] / accelerator.num_processes, summed[-2:]


def _clip(config: TrainingConfig, parameters: list[nn.Parameter], norm: Tensor) -> None:
    if config.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
    if config.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parameters, config.clip_value)


def _refuse(batches: list[Batch], step: int, norm: float) -> None:
    ids = [name for batch in batches for name in batch.ids]
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    raise NonFinite(
        f"step {step + 1}: the loss or the gradient (norm {norm}) is not finite; nothing was updated. Conversations: "
        f"{shown}. Look at their features, or lower training.lr_peak; the same command continues from the checkpoint"
    )


def make_optimizers(model: nn.Module, config: TrainingConfig) -> list[Optimizer]:
    """AdamW for everything, or Muon for the matrices and AdamW for the rest, to which a draft's own head belongs.

    Muon's updates are scaled to AdamW's usual size, so one learning rate serves both.
    """
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    if config.optimizer == "adamw":
        return [_adamw(matrices, others, config)]
    heads = [p for name, p in model.named_parameters() if name == LM_HEAD]
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name != LM_HEAD]
    muon = Muon(matrices, lr=config.lr_peak, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, _adamw(heads, others, config)]


def _adamw(decayed: list[nn.Parameter], plain: list[nn.Parameter], config: TrainingConfig) -> AdamW:
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=config.lr_peak, betas=config.betas, fused=True)


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then the schedule, ending near zero."""
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.lr_peak * (step + 1) / warmup
    left = (total_steps - step) / max(1, total_steps - warmup)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[config.schedule]
    return config.lr_peak * factor


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    """Give all parameter groups this rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


class MovingAverage:
    """Exponential moving average of a model's parameters; early on it forgets faster, so the start does not linger."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the averages; a second call undoes it."""
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(kept)


class GraphPerShape:
    """`backward(batch, counts)` by CUDA graphs, its batch and counts on the GPU."""

    def __init__(self, backward: Backward):
        self._backward = backward
        self.graphs = GraphCache(MOST_GRAPHS)

    def __call__(self, batch: Batch, counts: Tensor) -> Tensor:
        inputs = [*tensors_of(batch), counts]
        return self.graphs.run(shape_of(batch), lambda: self._backward(batch, counts), inputs).clone()


def shape_of(batch: Batch) -> Hashable:
    """What must be equal for two batches to be run by one graph."""
    longest = batch.documents.max_seqlen_k, batch.documents.max_seqlen_q
    return longest, tuple(tensor.shape for tensor in tensors_of(batch))


def tensors_of(value: Any) -> list[Tensor]:
    """A batch's tensors, in a fixed order."""
    parts = [getattr(value, field.name) for field in fields(value)]
    found: list[Tensor] = []
    for part in parts:
        found += tensors_of(part) if is_dataclass(part) else [part] if isinstance(part, Tensor) else []
    return found
