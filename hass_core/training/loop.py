"""The training loop: steps, validation, checkpoints, until the planned end, a signal or an early stop."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from hass_core.config import TreeConfig
from hass_core.decoding.replay import Recording
from hass_core.progress import Progress
from hass_core.store import StageFolder
from hass_core.training.batch import Batch
from hass_core.training.checkpoint import Position, remove_old, save_checkpoint, training_state
from hass_core.training.feed import Prefetcher
from hass_core.training.losses import PARTS, Objective
from hass_core.training.metrics import MetricsFile
from hass_core.training.sharding import as_first_process, gathered
from hass_core.training.step import StepResult, Trainer, learning_rate, set_learning_rate, train_step
from hass_core.training.validation import HeldOut, validate, validate_tree
from hass_core.units import size_words


@dataclass(frozen=True)
class Run:
    """All that training needs."""

    trainer: Trainer
    folder: StageFolder
    metrics: MetricsFile | None  # None on all processes but the first
    held: list[HeldOut]
    answers: list[Recording]  # replayed with trees of the shape `tree`
    tree: TreeConfig
    continues: bool  # from a draft, which is a candidate for the best
    packs_per_pass: int
    total_steps: int


def train(run: Run, steps: Prefetcher[list[Batch]], at: Position, progress: Progress) -> Position:
    """Train from `at` to the end; the last state is saved. Raises NonFinite.

    A draft that it continues from is validated first: what no validation finds better is kept.
    After a SIGTERM to any process all end after the same step: the state is saved and SystemExit(143) raised.
    """
    config, total = run.trainer.config, run.total_steps
    at = _begun(run, at)
    window, pace = Window(), Pace(at.step)
    saved, stop = at.step, False
    with stop_signal() as asked_to_stop:
        while at.step < total and not stop:
            asked = time.monotonic()
            batches = next(steps)
            waited = time.monotonic() - asked
            set_learning_rate(run.trainer.optimizers, learning_rate(config, at.step, total))
            done = train_step(run.trainer, batches, at.step, asked_to_stop.is_set())
            del batches  # freed while the device updates the weights, not when it has nothing to do
            stop = done.stop
            at = replace(at, step=at.step + 1, tokens_seen=at.tokens_seen + done.tokens)
            window.add(done, waited)
            if at.step % config.log_every_steps == 0 or at.step == total:
                _log(run, at, _training_record(run, at, window, done.gradient_norm))
                progress(at.step, total, f"{window.note(run.trainer)}, {pace.left(at.step, total)} left")
                window = Window()
            if at.step % config.validate_every_steps == 0 or at.step == total:
                at = _validate(run, at)
            if at.step % config.checkpoint_every_steps == 0 or at.step == at.best_step:
                saved = _save(run, at)
            if config.early_stop_validations and at.stale >= config.early_stop_validations:
                break
    if saved != at.step:
        _save(run, at)
    if stop:
        raise SystemExit(128 + signal.SIGTERM)
    return at


def _begun(run: Run, at: Position) -> Position:
    if run.continues and at == Position():
        at = _validate(run, at)
        _save(run, at)
    return at


def _validate(run: Run, at: Position) -> Position:
    """Each process validates on its share; what the first one found counts."""
    trainer = run.trainer
    if not run.held:
        return at
    if trainer.average:
        trainer.average.swap(trainer.draft)
    with gathered(trainer.wrapped):
        among = trainer.accelerator
        record = validate(trainer.alignment, trainer.head, run.held, trainer.objective, trainer.dtype, among)
        if run.answers:
            record |= validate_tree(trainer.draft, trainer.head, run.answers, run.tree, among)
    if trainer.average:
        trainer.average.swap(trainer.draft)
    record = as_first_process(record, trainer.accelerator)
    _log(run, at, record)
    return at.validated(record["val/tau"])


def _save(run: Run, at: Position) -> int:
    state = training_state(run.trainer.draft, run.trainer.optimizers, run.trainer.average)
    if run.metrics:
        save_checkpoint(run.folder, state, at, run.metrics.records)
        remove_old(run.folder, run.trainer.config.keep_checkpoints, at.best_step)
    run.trainer.accelerator.wait_for_everyone()
    return at.step


class Window:
    """Sums since the last log line."""

    def __init__(self) -> None:
        self.parts: Tensor | None = None
        self.steps, self.tokens, self.waited, self.start = 0, 0, 0.0, time.monotonic()

    def add(self, done: StepResult, waited: float) -> None:
        self.parts = done.parts if self.parts is None else self.parts + done.parts
        self.steps, self.tokens, self.waited = self.steps + 1, self.tokens + done.tokens, self.waited + waited

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

    def note(self, trainer: Trainer) -> str:
        """What the progress line tells: loss, speed, and on a GPU the most memory that tensors took on it."""
        note = f"loss {self.loss(trainer.objective):.3f}, {self.rate():,.0f} tokens/s"
        device = trainer.head.weight.device
        if device.type == "cuda":
            note += f", {size_words(torch.cuda.max_memory_allocated(device))}"
        return note


class Pace:
    """How long the rest takes, from the mean step since `step`, validations and checkpoints included."""

    def __init__(self, step: int):
        self.first, self.start = step, time.monotonic()

    def left(self, step: int, total_steps: int) -> str:
        """Hours, minutes and seconds, as 1:02:03."""
        seconds = (time.monotonic() - self.start) / (step - self.first) * (total_steps - step)
        return str(timedelta(seconds=round(seconds)))


def _training_record(run: Run, at: Position, window: Window, norm: float) -> dict[str, Any]:
    parts, config = window.mean(), run.trainer.config
    there = {"sampling": run.trainer.objective.samples, "regression": not run.trainer.draft.architecture.own_head}
    recorded = {name for name in PARTS if there.get(name, True)}
    return {
        "train/loss": window.loss(run.trainer.objective),
        **{f"train/{name}": float(parts[:, i].sum()) for i, name in enumerate(PARTS[:-1]) if name in recorded},
        **{f"train/accuracy_step_{j}": float(value) for j, value in enumerate(parts[:, -1], 1)},
        "train/lr": learning_rate(config, at.step - 1, run.total_steps),
        "train/grad_norm": norm,
        "train/tokens_per_second": window.rate(),
        "train/waiting_for_data": window.waiting(),
        "train/epoch": at.step * config.packs_per_step / run.packs_per_pass,
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
