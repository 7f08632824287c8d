"""The draft stage: features in, a trained draft out.

    config.json, model.safetensors                       the draft with the best val/tau
    draft_vocab.json or token_ranks.json                 the tokens it drafts, or may be confined to
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
from safetensors.torch import load_file

from hass_core.config import RunConfig, TrainingConfig, TreeConfig
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import CONFIG, RANKS, VOCABULARY, WEIGHTS, draft_info, save_draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.errors import BadInput
from hass_core.features.live import LiveFeatures, with_features
from hass_core.features.reader import Conversation, FeatureDataset
from hass_core.progress import Progress, no_progress
from hass_core.store import Artifact, StageFolder, Store
from hass_core.store.content import content_of
from hass_core.target_model.loader import Target, choose_dtype
from hass_core.training.alignment import Alignment
from hass_core.training.checkpoint import Position, checkpoints, load_checkpoint, load_weights
from hass_core.training.feed import Dataset, Division, Feed, Prefetcher, micro_batches
from hass_core.training.loop import Run, train
from hass_core.training.metrics import MetricsFile, read_records
from hass_core.training.optim import MovingAverage, make_optimizers
from hass_core.training.packing import PackStream, sample_order
from hass_core.training.padding import shape_step
from hass_core.training.sharding import can_be_captured, distribute, make_accelerator
from hass_core.training.start import start_least_squares
from hass_core.training.tree_validation import recorded_answers
from hass_core.training.validation import held_out
from hass_core.training.vocabulary import frequent_tokens, ranked_tokens

STEP_VERSION = 4  # 4: the target by its identity, a warm start by its content, the tree of val/tree_tau
METRICS = "metrics.jsonl"
READING_THREADS = 3
STEPS_AHEAD = 12  # half a second of a GPU's work: now and then a row group is late
MOST_RANKS = 32_768  # tokens whose rank is kept with a draft of the full vocabulary


def train_draft(
    config: RunConfig, features: Artifact, store: Store, target: Target, progress: Progress = no_progress
) -> Artifact:
    """Train a draft for `target` on `features`. See the module's docstring.

    Raises DraftMismatch or CorruptFile for unusable features, NonFinite when training breaks down.
    """
    folder = draft_folder(config, features, store, target)
    if done := folder.artifact():
        return done
    if config.pretraining:
        config = pretrained(config, features, store, target, progress)
    stored = FeatureDataset(store, features, "train", target.fingerprint)
    dataset = with_features(stored, target, config.features.max_tokens_per_batch)
    if len(dataset) == 0:
        raise BadInput(f"{features.url} holds no training conversation; generate more responses")
    accelerator = make_accelerator(target.device)
    torch.manual_seed(config.seed)
    head = make_head(config, stored, target)
    draft = make_draft(config, dataset, target)
    run = make_run(config, accelerator, draft, head, dataset, folder)
    validation = with_features(
        FeatureDataset(store, features, "validation"), target, config.features.max_tokens_per_batch
    )
    run.held = held_out(_all(validation), target.head, config.training.tokens_per_pack, config.training.align_steps)
    run.answers = recorded_answers(_all(validation), run.head, config.training.tree_answers)
    at = resume(run)
    if accelerator.is_main_process:
        run.metrics = MetricsFile(folder.scratch() / METRICS, at.step)

    stream = PackStream(dataset.lengths, config.training.tokens_per_pack, config.seed, dataset.blocks)
    division = _division(config, accelerator)
    total = total_steps(config, stream, division)
    feed = make_feed(run, dataset)
    # live features come from the one GPU; on a CPU more threads would take the cores from the training
    threads, ahead = (READING_THREADS, STEPS_AHEAD) if feed.pin and dataset is stored else (1, None)
    steps = Prefetcher(micro_batches(feed, stream, division, at.step), threads, ahead)
    started, before = time.monotonic(), at
    try:
        at = train(run, steps, at, total, progress)
    finally:
        steps.close()
    rate = (at.tokens_seen - before.tokens_seen) / (time.monotonic() - started)
    return _finish(run, at, target, rate, stored)


def pretrained(
    config: RunConfig, features: Artifact, store: Store, target: Target, progress: Progress = no_progress
) -> RunConfig:
    """Train by `config.pretraining`, and the settings of the second stage: `config` with that draft as its start."""
    first = config.model_copy(update={"training": config.pretraining, "pretraining": None})
    artifact = train_draft(
        first, features, store, target, lambda done, total, note: progress(done, total, f"1 of 2, {note}")
    )
    folder = Path(store.open(artifact).local_path(WEIGHTS)).parent
    draft = config.draft.model_copy(update={"warm_start": str(folder)})
    return config.model_copy(update={"draft": draft, "pretraining": None})


def metrics_path(config: RunConfig, features: Artifact, store: Store, target: Target) -> Path:
    """Where metrics.jsonl grows during training."""
    return draft_folder(config, features, store, target).scratch() / METRICS


def draft_folder(config: RunConfig, features: Artifact, store: Store, target: Target) -> StageFolder:
    """The stage's folder: named by the features, all settings that decide the draft, and this code's version.

    Raises BadInput when there is no draft at `draft.warm_start`.
    """
    warm = config.draft.warm_start
    key = {
        "features": features.digest,
        "target": target.identity.parts(),
        "draft": config.draft.model_dump(mode="json", exclude={"warm_start"}),
        "warm_start": content_of(_warm_weights(Path(warm))) if warm else None,
        "training": _deciding(config.training, config.tree, target),
        "pretraining": _deciding(config.pretraining, config.tree, target) if config.pretraining else None,
        "seed": config.seed,
        "version": STEP_VERSION,
    }
    return store.stage("draft", key)


def _deciding(training: TrainingConfig, tree: TreeConfig, target: Target) -> dict[str, Any]:
    """The settings of a training that decide its draft and curves. `recompute` gives the same numbers, slower."""
    on_the_way = {"log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "recompute"}
    shape = tree.model_dump(mode="json", include={"kind", "depth", "top_k", "nodes"})
    return {
        **training.model_dump(mode="json", exclude=on_the_way),
        "dtype": str(compute_dtype(training.dtype, target.device)),
        "tree": shape if training.tree_answers else None,  # of `val/tree_tau`
    }


def make_head(config: RunConfig, dataset: FeatureDataset, target: Target) -> DraftHead:
    """The target's head, cut to the draft vocabulary."""
    size, rows = config.draft.vocab_size, target.head.shape[0]
    if size is None or size >= rows:
        return DraftHead.from_target(target.head)
    return DraftHead.from_target(target.head, frequent_tokens(_all(dataset), size, rows, target.eos_token_ids))


def _all(dataset: FeatureDataset | LiveFeatures) -> Iterator[Conversation]:
    return (dataset[i] for i in range(len(dataset)))


def make_draft(config: RunConfig, dataset: FeatureDataset | LiveFeatures, target: Target) -> DraftModel:
    """A float32 draft at its start: an existing one, the least-squares fit, or random weights."""
    architecture = DraftArchitecture.from_target_config(target.model.config, config.draft.fc_bias)
    draft = DraftModel(architecture, target.embedding)
    if config.draft.warm_start:
        _continue_from(draft, Path(config.draft.warm_start))
    elif config.draft.start == "least_squares":
        start_least_squares(draft, (dataset[i] for i in sample_order(len(dataset), config.seed, dataset.blocks)))
    return draft


def _continue_from(draft: DraftModel, folder: Path) -> None:
    path = _warm_weights(folder)
    tensors = {name: value for name, value in load_file(path).items() if name != "embed_tokens.weight"}
    try:
        draft.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadInput(f"draft.warm_start: {path} does not fit this target: {error}") from error


def _warm_weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        raise BadInput(f"draft.warm_start: {path} does not exist; name a folder with {CONFIG} and {WEIGHTS}")
    return path


def make_run(
    config: RunConfig,
    accelerator: Accelerator,
    draft: DraftModel,
    head: DraftHead,
    dataset: FeatureDataset | LiveFeatures,
    folder: StageFolder,
) -> Run:
    """Put the pieces together."""
    training = config.training
    alignment = Alignment(draft, training.align_steps, training.detach_features, training.recompute)
    if training.compile:
        alignment.compile_parts()
    captured = training.compile and can_be_captured(accelerator) and isinstance(dataset, FeatureDataset)
    wrapped = distribute(alignment, accelerator, captured)
    stream = PackStream(dataset.lengths, training.tokens_per_pack, config.seed, dataset.blocks)
    return Run(
        config=training,
        seed=config.seed,
        accelerator=accelerator,
        alignment=alignment,
        wrapped=wrapped,
        head=head,
        optimizers=make_optimizers(draft, training),
        average=MovingAverage(draft, training.ema_decay) if training.ema_decay else None,
        held=[],
        answers=[],
        tree=config.tree,
        dtype=compute_dtype(training.dtype, head.weight.device),
        folder=folder,
        metrics=None,
        packs_per_step=_division(config, accelerator).packs_per_step,
        packs_per_pass=stream.packs_in(1),
        captured=captured,
    )


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type to train in. `auto` is bfloat16 where the device has units for it, else float32: never float16, in
    which a token's share of the gradient, some 1e-8, would be zero."""
    dtype = choose_dtype(name, device)
    return torch.float32 if dtype == torch.float16 else dtype


def make_feed(run: Run, dataset: Dataset) -> Feed:
    """Micro-batches as this run wants them."""
    round_to = shape_step(run.config) if run.captured else None
    return Feed(dataset, run.config.align_steps, run.accelerator.device.type == "cuda", round_to)


def resume(run: Run) -> Position:
    """Load the last checkpoint, if there is one."""
    names = checkpoints(run.folder)
    if not names:
        return Position()
    return load_checkpoint(run.folder, names[-1], run.alignment.draft, run.optimizers, run.average)


def total_steps(config: RunConfig, stream: PackStream, division: Division) -> int:
    """Optimizer steps of the configured passes."""
    steps = math.ceil(stream.packs_in(config.training.passes) / division.packs_per_step)
    return min(steps, config.training.max_steps or steps)


def _division(config: RunConfig, accelerator: Accelerator) -> Division:
    training = config.training
    return Division(
        training.packs_per_batch, training.accumulation_steps, accelerator.num_processes, accelerator.process_index
    )


def _finish(run: Run, at: Position, target: Target, tokens_per_second: float, dataset: FeatureDataset) -> Artifact:
    """Publish the best draft and the curves; the manifest last."""
    run.accelerator.wait_for_everyone()
    best = at.best_step or at.step
    summary = summarize(run, at, best, tokens_per_second)
    if not run.accelerator.is_main_process:
        run.accelerator.wait_for_everyone()
        return Artifact(stage=run.folder.stage, digest=run.folder.digest, root=run.folder.store.root, summary=summary)
    scratch = run.folder.scratch() / "draft"
    extra = {"trained_steps": best, "tokens_seen": at.tokens_seen, "val_tau": at.best_tau}
    extra["trained_tokens"] = int(dataset.lengths.max())  # of the longest conversation
    draft = DraftModel(run.alignment.draft.architecture, run.alignment.draft.embedding)
    load_weights(run.folder, best, draft)
    ranks = ranked_tokens(_all(dataset), target.head.shape[0], target.eos_token_ids)[:MOST_RANKS]
    save_draft(scratch, draft, run.head, draft_info(target, extra), ranks)
    names = [CONFIG, WEIGHTS, RANKS if run.head.token_ids is None else VOCABULARY]
    for name, source in [*((name, scratch / name) for name in names), (METRICS, run.folder.scratch() / METRICS)]:
        with run.folder.writing(name) as file:
            file.path.write_bytes(source.read_bytes())
    artifact = run.folder.finish(summary)
    run.accelerator.wait_for_everyone()
    return artifact


def summarize(run: Run, at: Position, best: int, tokens_per_second: float) -> dict[str, Any]:
    """The manifest's summary: totals, and the figures of the best validation."""
    records = read_records(run.folder.scratch() / METRICS)
    validation = next((r for r in records if r["step"] == best and "val/tau" in r), {})
    trained = next((r for r in reversed(records) if "train/loss" in r), {})
    return {
        "steps": at.step,
        "best_step": best,
        "tokens_seen": at.tokens_seen,
        "tokens_per_second": round(tokens_per_second, 1),
        "draft_vocab_size": run.head.size,
        "parameters": sum(p.numel() for p in run.alignment.parameters()),
        "loss": trained.get("train/loss"),
        **{name: value for name, value in validation.items() if name.startswith("val/")},
    }
