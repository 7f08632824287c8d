"""The training loop: steps, validation, checkpoints, until the planned end, a signal or an early stop."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from hass_core.config import TrainingConfig, TreeConfig
from hass_core.decoding.replay import Recording
from hass_core.draft_model.head import DraftHead
from hass_core.errors import NonFinite
from hass_core.progress import Progress
from hass_core.store import StageFolder
from hass_core.training.alignment import Alignment
from hass_core.training.batch import Batch
from hass_core.training.captured import Captured
from hass_core.training.checkpoint import Position, remove_old, save_checkpoint, training_state
from hass_core.training.feed import Prefetcher, noisy
from hass_core.training.losses import PARTS, Objective, distill
from hass_core.training.metrics import MetricsFile
from hass_core.training.optim import MovingAverage, global_norm, learning_rate, set_learning_rate
from hass_core.training.sharding import average, gathered, unsynced, whole
from hass_core.training.tree_validation import validate_tree
from hass_core.training.validation import HeldOut, validate


@dataclass
class Run:
    """All that training needs; `wrapped` is the alignment as accelerate distributes it."""

    config: TrainingConfig
    seed: int
    accelerator: Accelerator
    alignment: Alignment
    wrapped: nn.Module
    head: DraftHead
    optimizers: list[Optimizer]
    average: MovingAverage | None
    held: list[HeldOut]
    answers: list[Recording]  # replayed with trees of the shape `tree`
    tree: TreeConfig
    dtype: torch.dtype
    folder: StageFolder
    metrics: MetricsFile | None  # None on all processes but the first
    packs_per_step: int
    packs_per_pass: int
    captured: bool = False  # each step as a CUDA graph; see `sharding` for how processes then exchange gradients

    def __post_init__(self) -> None:
        eager = partial(_backward, self)
        self.backward = Captured(eager) if self.captured else eager

    @property
    def objective(self) -> Objective:
        return Objective.from_config(self.config)


def train(run: Run, steps: Prefetcher[list[Batch]], at: Position, total_steps: int, progress: Progress) -> Position:
    """Train from `at` to `total_steps`; the last state is saved. Raises NonFinite; SIGTERM saves and exits with 143."""
    window, pace = Window(), Pace(at.step)
    saved = at.step
    with stop_signal() as stopped:
        while at.step < total_steps and not stopped.is_set():
            asked = time.monotonic()
            batches = next(steps)
            waited = time.monotonic() - asked
            set_learning_rate(run.optimizers, learning_rate(run.config, at.step, total_steps))
            parts, norm = train_step(run, batches, at.step)
            tokens = sum(batch.num_tokens for batch in batches) * run.accelerator.num_processes
            del batches  # freed while the device updates the weights, not when it has nothing to do
            at = replace(at, step=at.step + 1, tokens_seen=at.tokens_seen + tokens)
            window.add(parts, tokens, waited)
            if at.step % run.config.log_every_steps == 0 or at.step == total_steps:
                _log(run, at, _training_record(run, at, window, norm, total_steps))
                progress(at.step, total_steps, f"{window.note(run)}, {pace.left(at.step, total_steps)} left")
                window = Window()
            if at.step % run.config.validate_every_steps == 0 or at.step == total_steps:
                at = _validate(run, at)
            if at.step % run.config.checkpoint_every_steps == 0 or at.step == at.best_step:
                saved = _save(run, at)
            if run.config.early_stop_validations and at.stale >= run.config.early_stop_validations:
                break
    if saved != at.step:
        _save(run, at)
    if stopped.is_set():
        raise SystemExit(128 + signal.SIGTERM)
    return at


def train_step(run: Run, batches: list[Batch], step: int) -> tuple[Tensor, float]:
    """One optimizer step: its loss parts [n, 4], means over supervised tokens on all devices, and the gradient norm.

    Raises NonFinite, before the update, when the loss or the gradient is not finite.
    """
    processes = run.accelerator.num_processes
    device = run.head.weight.device
    counts = torch.stack([batch.counts for batch in batches]).sum(0).to(device)
    counts = torch.as_tensor(run.accelerator.reduce(counts, "sum")) / processes  # gradients will be averaged
    parts = torch.zeros(run.config.align_steps, len(PARTS), device=device)
    for number, batch in enumerate(batches):
        last = number + 1 == len(batches)
        seed = hash((run.seed, step, number, run.accelerator.process_index)) % 2**63
        with nullcontext() if last else unsynced(run.wrapped, run.accelerator):
            moved = batch.to(device)
            if run.config.feature_noise:
                moved = replace(moved, noisy=noisy(moved, run.config.feature_noise, seed).to(run.dtype))
            parts += run.backward(moved, counts)
    if run.captured:
        gradients = [p.grad for p in run.alignment.parameters() if p.grad is not None]
        average([parts, *gradients], run.accelerator)
    else:
        parts = torch.as_tensor(run.accelerator.reduce(parts, "mean"))
    norm = float(whole(global_norm(run.alignment.parameters())))  # the one moment a step waits for the device
    if not (math.isfinite(norm) and bool(parts.isfinite().all())):
        _refuse(batches, step, norm)
    _clip(run, norm)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=not run.captured)
    if run.average:
        run.average.update(run.alignment.draft, step)
    return parts, norm


def _backward(run: Run, batch: Batch, counts: Tensor) -> Tensor:
    with torch.autocast(batch.features.device.type, run.dtype, enabled=run.dtype != torch.float32):
        outputs = run.wrapped(batch, batch.inputs.to(run.dtype))
    parts, gradients = distill(outputs, batch, run.head, run.objective, counts)
    torch.autograd.backward(outputs, gradients)
    return parts


def _clip(run: Run, norm: float) -> None:
    parameters = [p for p in run.alignment.parameters() if p.grad is not None]
    if run.config.clip_norm is not None and norm > run.config.clip_norm:
        torch._foreach_mul_([p.grad for p in parameters], run.config.clip_norm / norm)  # pyright: ignore
    if run.config.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parameters, run.config.clip_value)


def _refuse(batches: list[Batch], step: int, norm: float) -> None:
    ids = [name for batch in batches for name in batch.ids]
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    raise NonFinite(
        f"step {step + 1}: the loss or the gradient (norm {norm}) is not finite; nothing was updated. Conversations: "
        f"{shown}. Look at their features, or lower training.lr_peak; the same command continues from the checkpoint"
    )


def _validate(run: Run, at: Position) -> Position:
    if not run.held:
        return at
    if run.average:
        run.average.swap(run.alignment.draft)
    with gathered(run.wrapped):
        record = validate(run.alignment, run.head, run.held, run.objective, run.dtype)
        if run.answers:
            record |= validate_tree(run.alignment.draft, run.head, run.answers, run.tree)
    if run.average:
        run.average.swap(run.alignment.draft)
    _log(run, at, record)
    return at.validated(record["val/tau"])


def _save(run: Run, at: Position) -> int:
    state = training_state(run.alignment.draft, run.optimizers, run.average)
    if run.accelerator.is_main_process:
        save_checkpoint(run.folder, state, at)
        remove_old(run.folder, run.config.keep_checkpoints, at.best_step)
    run.accelerator.wait_for_everyone()
    return at.step


class Window:
    """Sums since the last log line."""

    def __init__(self) -> None:
        self.parts: Tensor | None = None
        self.steps, self.tokens, self.waited, self.start = 0, 0, 0.0, time.monotonic()

    def add(self, parts: Tensor, tokens: int, waited: float) -> None:
        self.parts = parts if self.parts is None else self.parts + parts
        self.steps, self.tokens, self.waited = self.steps + 1, self.tokens + tokens, self.waited + waited

    def mean(self) -> Tensor:
        assert self.parts is not None
        return self.parts.cpu() / self.steps

    def loss(self, objective: Objective) -> float:
        return float(objective.combine(self.mean()))

    def rate(self) -> float:
        return self.tokens / (time.monotonic() - self.start)

    def waiting(self) -> float:
        """The share of the time that was spent waiting for the next batches."""
        return self.waited / (time.monotonic() - self.start)

    def note(self, run: Run) -> str:
        """What the progress line tells: loss, speed, and on a GPU the most memory that tensors took on it."""
        told, device = f"loss {self.loss(run.objective):.3f}, {self.rate():,.0f} tokens/s", run.head.weight.device
        if device.type == "cuda":
            told += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        return told


class Pace:
    """How long the rest takes, from the mean step since `step`, validations and checkpoints included."""

    def __init__(self, step: int):
        self.first, self.start = step, time.monotonic()

    def left(self, step: int, total_steps: int) -> str:
        """Hours, minutes and seconds, as 1:02:03."""
        seconds = (time.monotonic() - self.start) / (step - self.first) * (total_steps - step)
        return str(timedelta(seconds=round(seconds)))


def _training_record(run: Run, at: Position, window: Window, norm: float, total_steps: int) -> dict[str, Any]:
    parts = window.mean()
    return {
        "train/loss": window.loss(run.objective),
        **{f"train/{name}": float(parts[:, i].sum()) for i, name in enumerate(PARTS[:3])},
        **{f"train/accuracy_step_{j}": float(value) for j, value in enumerate(parts[:, 3], 1)},
        "train/lr": learning_rate(run.config, at.step - 1, total_steps),
        "train/grad_norm": norm,
        "train/tokens_per_second": window.rate(),
        "train/waiting_for_data": window.waiting(),
        "train/epoch": at.step * run.packs_per_step / run.packs_per_pass,
    }


def _log(run: Run, at: Position, record: dict[str, Any]) -> None:
    if run.metrics:
        run.metrics.append({"step": at.step, "tokens_seen": at.tokens_seen, **record})


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; in a thread other than the main one signals cannot be caught, and none is."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)
