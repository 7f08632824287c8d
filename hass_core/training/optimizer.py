"""Optimizers, learning-rate schedule, and the moving average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from hass_core.config import TrainingConfig
from hass_core.draft_model.eagle3 import LM_HEAD


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
