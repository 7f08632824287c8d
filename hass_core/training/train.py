"""The draft stage: features in, a trained draft out.

    config.json, model.safetensors                       the draft with the best val/tau
    draft_vocab.json or token_ranks.json                 the tokens it drafts, or may be confined to; an eagle3
                                                         draft's stand with its weights
    metrics.jsonl                                        the curves (metrics.py)
    checkpoint-*.safetensors                             training states to resume from

While it runs, metrics.jsonl grows at `metrics_path`. Running it again continues from the last checkpoint.

With `config.pretraining` a whole draft is trained by those settings first, an artifact of its own, and this one starts
from it: the two stages of the paper's recipe.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hass_core.config import RunConfig, TrainingConfig, TreeConfig
from hass_core.decoding.drafter import CALIBRATION
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import draft_info, draft_model, save_draft, warm_start
from hass_core.draft_model.family import new_architecture, shape_key
from hass_core.draft_model.files import WEIGHTS
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.identity import draft_identity
from hass_core.draft_model.layers import DraftModel, Eagle3Model, build_draft
from hass_core.draft_model.shipped import draft_at
from hass_core.errors import BadInput, DraftMismatch
from hass_core.features.live import LiveFeatures, with_features
from hass_core.features.reader import Conversation, FeatureDataset
from hass_core.progress import Progress, no_progress
from hass_core.store import Artifact, StageFolder, Store
from hass_core.target_model.known import KnownTarget
from hass_core.target_model.loader import Target
from hass_core.target_model.taps import check_taps
from hass_core.training.checkpoint import Position, checkpoints, load_checkpoint, load_weights
from hass_core.training.feed import Dataset, Division, Feed, PackStream, Prefetcher, micro_batches, sample_order
from hass_core.training.loop import Run, train
from hass_core.training.metrics import MetricsFile
from hass_core.training.sharding import make_accelerator
from hass_core.training.start import ranked_tokens, start_from_target, start_fusion, start_least_squares
from hass_core.training.step import Trainer, compute_dtype
from hass_core.training.validation import held_out, recorded_answers, validate_sampling

# 4: the target by its identity, a warm start by its content; steps divided by packs_per_step, noise of a pack its own
STEP_VERSION = 4
CONTINUING_VERSION = 2  # of what continues from a draft; 2: that draft is validated too, and its ranks are the ties'
METRICS = "metrics.jsonl"
READING_THREADS = 3
STEPS_AHEAD = 12  # half a second of a GPU's work: now and then a row group is late
MOST_RANKS = 32_768  # tokens whose rank is kept with a draft of the full vocabulary


def train_draft(
    config: RunConfig, features: Artifact, store: Store, target: KnownTarget, progress: Progress = no_progress
) -> Artifact:
    """Train a draft for `target` on `features`, which may lack its layers where these are stored. See the module's
    docstring.

    Raises DraftMismatch or CorruptFile for unusable features, BadInput for what cannot be trained on or divided among
    the processes, NonFinite when training breaks down.
    """
    folder = draft_folder(config, features, store, target)
    if done := folder.artifact():
        return done
    accelerator = make_accelerator(target.device)
    division = _division(config.training, accelerator)
    if config.pretraining:
        config = pretrained(config, features, store, target, progress)
    stored = FeatureDataset(store, features, "train", target.fingerprint)
    check_states(config, stored, target)
    dataset = with_features(stored, target, config.features.max_tokens_per_batch)
    if len(dataset) == 0:
        raise BadInput(f"{features.url} holds no training conversation; generate more responses")
    if accelerator.is_main_process:
        store.open(features).note_use()
    torch.manual_seed(config.seed)
    head = make_head(config, stored, target)
    draft = make_draft(config, dataset, target, head)
    trainer = Trainer.of(config.training, config.seed, accelerator, draft, head, capture=dataset is stored)
    validation = with_features(
        FeatureDataset(store, features, "validation"), target, config.features.max_tokens_per_batch
    )
    at, records = resume(trainer, folder)
    stream = PackStream(dataset.lengths, config.training.tokens_per_pack, config.seed, dataset.blocks)
    run = Run(
        trainer=trainer,
        folder=folder,
        metrics=MetricsFile(folder.scratch() / METRICS, records) if accelerator.is_main_process else None,
        held=held_out(_all(validation), target.head, config.training.tokens_per_pack, config.training.align_steps),
        answers=recorded_answers(_all(validation), head, config.training.tree_answers),
        tree=config.tree,
        continues=config.draft.warm_start is not None,
        packs_per_pass=stream.packs_in(1),
        total_steps=total_steps(config.training, stream),
    )
    feed = make_feed(trainer, dataset, division)
    # live features come from the one GPU; on a CPU more threads would take the cores from the training
    threads, ahead = (READING_THREADS, STEPS_AHEAD) if feed.pin and dataset is stored else (1, None)
    steps = Prefetcher(micro_batches(feed, stream, division, at.step), threads, ahead)
    started, before = time.monotonic(), at
    try:
        at = train(run, steps, at, progress)
    finally:
        steps.close()
    rate = (at.tokens_seen - before.tokens_seen) / (time.monotonic() - started)
    return _finish(run, at, target, rate, ranked(config, stored, target), int(stored.lengths.max()))


def check_states(config: RunConfig, stored: FeatureDataset, target: KnownTarget) -> None:
    """Raise DraftMismatch where the features hold other states of the target than the draft reads."""
    wanted, found = config.draft.tapped(target.num_layers), stored.info.taps
    if wanted != found:
        raise DraftMismatch(
            f"the features hold the states after layers {list(found)} beside the last one, and by draft.taps the draft "
            f"reads {list(wanted)}; extract features with these settings"
        )


def pretrained(
    config: RunConfig, features: Artifact, store: Store, target: KnownTarget, progress: Progress = no_progress
) -> RunConfig:
    """Train by `config.pretraining`, and the settings of the second stage: `config` with that draft as its start."""
    first = config.model_copy(update={"training": config.pretraining, "pretraining": None})
    artifact = train_draft(
        first, features, store, target, lambda done, total, note: progress(done, total, f"1 of 2, {note}")
    )
    folder = Path(store.open(artifact).local_path(WEIGHTS)).parent
    draft = config.draft.model_copy(update={"warm_start": str(folder)})
    return config.model_copy(update={"draft": draft, "pretraining": None})


def metrics_path(config: RunConfig, features: Artifact, store: Store, target: KnownTarget) -> Path:
    """Where metrics.jsonl grows during training."""
    return draft_folder(config, features, store, target).scratch() / METRICS


def draft_folder(config: RunConfig, features: Artifact, store: Store, target: KnownTarget) -> StageFolder:
    """The stage's folder: named by the features, all settings that decide the draft, and this code's version.

    Raises CorruptFile or DraftMismatch when there is no draft for this target at `draft.warm_start`.
    """
    warm = config.draft.warm_start
    key = {
        "features": features.digest,
        "target": target.identity.parts(),
        "draft": config.draft.model_dump(mode="json", include={"vocab_size", "start"}),  # its shape: below
        "warm_start": draft_identity(warm_start(draft_at(warm), target)) if warm else None,
        "training": _deciding(config.training, config.tree, target),
        "pretraining": _deciding(config.pretraining, config.tree, target) if config.pretraining else None,
        "seed": config.seed,
        "version": STEP_VERSION,
    }
    key |= {} if warm else shape_key(target.config, config.draft)
    key |= {"continuing": CONTINUING_VERSION} if warm or config.pretraining else {}
    return store.stage("draft", key)


def _deciding(training: TrainingConfig, tree: TreeConfig, target: KnownTarget) -> dict[str, Any]:
    """The settings of a training that decide its draft and curves; two of the others only save memory."""
    on_the_way = {
        "log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "recompute", "packs_per_micro_batch"
    }  # fmt: skip
    shape = tree.model_dump(mode="json", include={"kind", "depth", "top_k", "nodes"})
    return {
        **training.model_dump(mode="json", exclude=on_the_way),
        "dtype": str(compute_dtype(training.dtype, target.device)),
        "tree": shape if training.tree_answers else None,  # of `val/tree_tau`
    }


def make_head(config: RunConfig, dataset: FeatureDataset, target: KnownTarget) -> DraftHead:
    """The target's head, cut to the draft vocabulary: that of the draft to continue where it has a head of its own."""
    size, rows = config.draft.vocab_size, target.head.shape[0]
    if config.draft.warm_start and config.draft.architecture == "eagle3":
        return DraftHead.from_target(target.head, warm_start(draft_at(config.draft.warm_start), target).vocabulary)
    if size is None or size >= rows:
        return DraftHead.from_target(target.head)
    return DraftHead.from_target(target.head, ranked(config, dataset, target)[:size].sort().values)


def ranked(config: RunConfig, dataset: FeatureDataset, target: KnownTarget) -> Tensor:
    """All tokens [V], the answers' most frequent first; a draft to continue from ranks those equally frequent."""
    before = None
    if config.draft.warm_start:
        start = warm_start(draft_at(config.draft.warm_start), target)
        before = start.vocabulary if start.ranks is None else start.ranks
    return ranked_tokens(dataset.answers(), target.head.shape[0], target.eos_token_ids, before)


def _all(dataset: FeatureDataset | LiveFeatures) -> Iterator[Conversation]:
    return (dataset[i] for i in range(len(dataset)))


def make_draft(
    config: RunConfig, dataset: FeatureDataset | LiveFeatures, target: KnownTarget, head: DraftHead
) -> DraftModel:
    """A float32 draft at its start: an existing one, the least-squares fit, or random weights; a head of its own starts
    as the target's, whose rows of the draft vocabulary are `head`."""
    if config.draft.warm_start:
        return draft_model(warm_start(draft_at(config.draft.warm_start), target, config.draft), target.embedding)
    draft = build_draft(new_architecture(target.config, config.draft, head.size), target.embedding)
    conversations = (dataset[i] for i in sample_order(len(dataset), config.seed, dataset.blocks))
    if isinstance(draft, Eagle3Model):
        start_from_target(draft, head, conversations)
        if config.draft.start == "least_squares" and draft.taps:
            again = (dataset[i] for i in sample_order(len(dataset), config.seed, dataset.blocks))
            start_fusion(draft, again)
    elif config.draft.start == "least_squares":
        start_least_squares(draft, conversations)
    return draft


def start_architecture(config: RunConfig, target: KnownTarget) -> DraftArchitecture:
    """The shape of the draft that these settings train: told by settings and target alone, before answers are made.

    Raises TargetError, CorruptFile or DraftMismatch where there is no such draft.
    """
    if isinstance(target, Target):
        check_taps(target, config.draft.tapped(target.num_layers))
    if config.draft.warm_start:
        return warm_start(draft_at(config.draft.warm_start), target, config.draft).architecture
    size, rows = config.draft.vocab_size, target.head.shape[0]
    return new_architecture(target.config, config.draft, min(size or rows, rows))


def make_feed(trainer: Trainer, dataset: Dataset, division: Division) -> Feed:
    """Micro-batches as this trainer wants them."""
    tokens = division.micro_batch * trainer.config.tokens_per_pack
    pin = trainer.accelerator.device.type == "cuda"
    return Feed(dataset, trainer.config.align_steps, pin, tokens if trainer.captured else None)


def resume(trainer: Trainer, folder: StageFolder) -> tuple[Position, list[dict[str, Any]]]:
    """Load the last checkpoint and the curves up to it, if there is one; it does not matter how many processes made it,
    or where."""
    names = checkpoints(folder)
    if not names:
        return Position(), []
    return load_checkpoint(folder, names[-1], trainer.draft, trainer.optimizers, trainer.average)


def total_steps(training: TrainingConfig, stream: PackStream) -> int:
    """Optimizer steps of the configured passes."""
    steps = math.ceil(stream.packs_in(training.passes) / training.packs_per_step)
    return min(steps, training.max_steps or steps)


def _division(training: TrainingConfig, accelerator: Accelerator) -> Division:
    processes, process = accelerator.num_processes, accelerator.process_index
    return Division(training.packs_per_step, training.packs_per_micro_batch, processes, process)


def _finish(
    run: Run, at: Position, target: KnownTarget, tokens_per_second: float, ranks: Tensor, longest: int
) -> Artifact:
    """Publish the best draft and the curves, the manifest last: by the first process, the others wait for it.

    `ranks` are the tokens by frequency, `longest` the tokens of the longest conversation trained on.
    """
    if run.metrics:
        best = at.best_step if at.best_tau else at.step  # without validation the last
        extra = {
            "trained_steps": best,
            "tokens_seen": at.tokens_seen,
            "val_tau": at.best_tau,
            "trained_tokens": longest,
        }
        files, sampled = _written(run, best, target, extra, ranks)
        for name, source in files.items():
            with run.folder.writing(name) as file:
                file.path.write_bytes(source.read_bytes())
        run.folder.finish(summarize(run.trainer, run.metrics.records, at, best, tokens_per_second) | sampled)
    run.trainer.accelerator.wait_for_everyone()
    artifact = run.folder.artifact()
    assert artifact
    return artifact


def _written(
    run: Run, best: int, target: KnownTarget, extra: dict[str, Any], ranks: Tensor
) -> tuple[dict[str, Path], dict[str, float]]:
    """The stage's files, written to the scratch folder: the draft of step `best`, with what its record tells beside the
    target, and the curves; and what the draft is worth where answers are sampled."""
    scratch, trainer = run.folder.scratch(), run.trainer
    draft = build_draft(trainer.draft.architecture, trainer.draft.embedding)
    load_weights(run.folder, best, draft)
    sampled: dict[str, float] = {}
    if run.answers:
        calibration, sampled = validate_sampling(draft, trainer.head, run.answers, run.tree, target.head)
        extra |= {CALIBRATION: calibration} if calibration else {}
    names = save_draft(scratch / "draft", draft, trainer.head, draft_info(target, extra), ranks[:MOST_RANKS])
    return {name: scratch / "draft" / name for name in names} | {METRICS: scratch / METRICS}, sampled


def summarize(
    trainer: Trainer, records: list[dict[str, Any]], at: Position, best: int, tokens_per_second: float
) -> dict[str, Any]:
    """The manifest's summary: totals, and the figures of the best validation."""
    validation = next((r for r in records if r["step"] == best and "val/tau" in r), {})
    trained = next((r for r in reversed(records) if "train/loss" in r), {})
    return {
        "steps": at.step,
        "best_step": best,
        "tokens_seen": at.tokens_seen,
        "tokens_per_second": round(tokens_per_second, 1),
        "draft_vocab_size": trainer.head.size,
        "parameters": sum(p.numel() for p in trainer.alignment.parameters()),
        "loss": trained.get("train/loss"),
        **{name: value for name, value in validation.items() if name.startswith("val/")},
    }
