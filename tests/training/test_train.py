"""The draft stage as a user meets it: trains, resumes after any death, refuses bad input by name."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from hass_core.bench import training as bench
from hass_core.config import RunConfig, parse_config
from hass_core.draft_model.checkpoint import load_draft
from hass_core.errors import CorruptFile, DraftMismatch, NonFinite
from hass_core.features.reader import FeatureDataset
from hass_core.store import Artifact, StageFolder, Store
from hass_core.target_model.loader import Target, freeze
from hass_core.training import loop, step
from hass_core.training.batch import collate
from hass_core.training.metrics import read_metrics
from hass_core.training.step import compute_dtype
from hass_core.training.train import draft_folder, train_draft
from tests.conftest import byte_tokenizer, tiny_llama
from tests.processes import start, wait
from tests.training.conftest import make_talk, read_records, store_features

MEASURED = {"train/tokens_per_second", "train/waiting_for_data"}
SETTINGS = {
    "training": {
        "tokens_per_pack": 64,
        "packs_per_step": 2,
        "passes": 3,
        "lr_peak": 2e-3,
        "dtype": "float32",
        "log_every_steps": 1,
        "validate_every_steps": 5,
        "checkpoint_every_steps": 4,
        "feature_noise": 0.05,
    },
}


def settings(architecture: str = "eagle", **training: object) -> RunConfig:
    draft = {"architecture": architecture}
    return parse_config({**SETTINGS, "draft": draft, "training": SETTINGS["training"] | training})


@pytest.fixture
def features(store: Store, tiny_target: Target) -> Artifact:
    return store_features(store, tiny_target)


def weights(store: Store, artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(store.open(artifact).local_path("model.safetensors"))


def test_training_lowers_the_loss_and_leaves_a_loadable_draft(store, tiny_target, features, tmp_path):
    config = settings(passes=12)
    artifact = train_draft(config, features, store, tiny_target)
    assert (Path(features.url) / "used").is_file(), "else hass store prune may take it away meanwhile"
    folder = store.open(artifact)
    records = [json.loads(line) for line in folder.read_text("metrics.jsonl").splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses[-1] < 0.98 * losses[0]
    assert {"val/tau", "val/chain_5", "val/accuracy_step_1"} <= artifact.summary.keys()
    draft = load_draft(Path(folder.local_path("config.json")).parent, tiny_target)
    assert draft.info["target_identity"] == tiny_target.identity.parts()


@dataclass(frozen=True)
class Trained:
    """A finished draft, and what its training needed and told."""

    store: Store
    features: Artifact
    draft: Artifact
    told: list[tuple[int, int, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_target) -> Trained:
    """With the usual settings; for tests that add to its store and change nothing there."""
    store, told = Store(tmp_path_factory.mktemp("trained")), []
    features = store_features(store, tiny_target)
    draft = train_draft(settings(), features, store, tiny_target, lambda *given: told.append(given))
    return Trained(store, features, draft, told)


def test_the_progress_line_tells_loss_speed_and_the_time_left(trained):
    told = trained.told
    total = told[0][1]
    assert [done for done, _, _ in told] == list(range(1, total + 1))
    assert all(re.fullmatch(r"loss \d\.\d{3}, [\d,]+ tokens/s, \d+:\d\d:\d\d left", note) for _, _, note in told)
    assert told[-1][2].endswith(", 0:00:00 left")


def test_trees_over_held_out_answers_are_counted_at_every_validation(store, tiny_target, features):
    chosen = parse_config({**SETTINGS, "tree": {"depth": 3, "top_k": 2, "nodes": 6}})
    draft = train_draft(chosen, features, store, tiny_target)
    records = [json.loads(line) for line in store.open(draft).read_text("metrics.jsonl").splitlines()]
    taus = [record["val/tree_tau"] for record in records if "val/tau" in record]
    assert taus
    assert all(1 <= tau <= 4 for tau in taus)
    assert draft.summary["val/tree_tau"] in taus
    assert 1 <= draft.summary["tree_tau_sampled"] <= 4
    loaded = load_draft(Path(store.open(draft).local_path("config.json")).parent, tiny_target)
    assert set(loaded.info["calibration"]) == {"0.6", "0.8", "1.0"}


def test_a_finished_draft_is_found_again(trained, tiny_target):
    started = time.monotonic()
    assert train_draft(settings(), trained.features, trained.store, tiny_target) == trained.draft
    assert time.monotonic() - started < 1


def test_a_trimmed_draft_keeps_the_end_token(store, tiny_target, features):
    config = settings().model_copy(update={"draft": settings().draft.model_copy(update={"vocab_size": 40})})
    artifact = train_draft(config, features, store, tiny_target)
    token_ids = json.loads(store.open(artifact).read_text("draft_vocab.json"))
    assert len(token_ids) == 40
    assert set(tiny_target.eos_token_ids) <= set(token_ids)


@contextmanager
def interrupted_at_seven() -> Iterator[None]:
    """A person's Ctrl-C before the seventh step."""
    take_step = loop.train_step

    def steps(trainer, batches, step, stop):
        if step == 7:
            raise KeyboardInterrupt
        return take_step(trainer, batches, step, stop)

    with patch.object(loop, "train_step", steps), pytest.raises(KeyboardInterrupt):
        yield


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_training_continues_bit_for_bit(store, tiny_target, features, tmp_path, optimizer):
    config = settings(optimizer=optimizer, ema_decay=0.9)
    whole = weights(store, train_draft(config, features, store, tiny_target))

    other = Store(tmp_path / "other")
    again = store_features(other, tiny_target)
    with interrupted_at_seven():
        train_draft(config, again, other, tiny_target)
    resumed = train_draft(config, again, other, tiny_target)
    for name, value in weights(other, resumed).items():
        assert torch.equal(value, whole[name]), name


def train_once(root: Path) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    store, target = Store(root), freeze(tiny_llama(), byte_tokenizer(), name="tiny")
    train_draft(settings(passes=8), store_features(store, target), store, target)


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and any(r["step"] >= step for r in read_records(path))):
        assert time.monotonic() < deadline, "training never got there"
        time.sleep(0.01)


def folder_of_once(root: Path, target: Target) -> StageFolder:
    """Where `train_once` leaves its draft."""
    store = Store(root)
    return draft_folder(settings(passes=8), store_features(store, target), store, target)


def curve(folder: StageFolder) -> list[dict[str, float]]:
    """What does not depend on the clock."""
    records = read_metrics(folder.read_text("metrics.jsonl"))
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]


@pytest.fixture(scope="module")
def whole_curve(tmp_path_factory, tiny_target) -> list[dict[str, float]]:
    """Of a process that nobody killed."""
    root = tmp_path_factory.mktemp("whole")
    assert wait(start(train_once, root)) == 0
    return curve(folder_of_once(root, tiny_target))


@pytest.mark.slow
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_run_again_gives_the_same_curve(tmp_path, tiny_target, whole_curve, death):
    folder = folder_of_once(tmp_path, tiny_target)
    process = start(train_once, tmp_path)
    wait_for_step(folder.scratch() / "metrics.jsonl", step=9)
    os.kill(process.pid, death)
    assert wait(process, 60) == (-9 if death == signal.SIGKILL else 143)
    assert folder.artifact() is None
    assert wait(start(train_once, tmp_path)) == 0
    assert curve(folder) == whole_curve


def test_training_continued_on_another_machine_keeps_its_curves(store, tiny_target, features):
    """The store is there, the scratch folder of the machine that died is not."""
    with interrupted_at_seven():
        train_draft(settings(), features, store, tiny_target)
    shutil.rmtree(draft_folder(settings(), features, store, tiny_target).scratch())
    resumed = train_draft(settings(), features, store, tiny_target)
    records = [json.loads(line) for line in store.open(resumed).read_text("metrics.jsonl").splitlines()]
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == list(range(1, resumed.summary["steps"] + 1))


def test_a_non_finite_feature_stops_before_the_update_and_names_the_conversations(
    store, tiny_target, features, monkeypatch
):
    real = step.distill

    def poisoned(outputs, *rest):
        parts, gradients = real(outputs, *rest)
        gradients[0][0, 0] = torch.nan
        return parts, gradients

    monkeypatch.setattr(step, "distill", poisoned)
    with pytest.raises(NonFinite, match=r"step 1: .* not finite; nothing was updated\. Conversations: talk-\d+"):
        train_draft(settings(), features, store, tiny_target)


def test_noise_disturbs_what_the_draft_is_given_and_not_what_it_is_to_predict(talks):
    """A draft of zeros answers the same whatever it is given: then its loss doesn't know of the noise."""
    losses = []
    for zero in (True, False):
        for noise in (0.0, 1.0):
            config = settings(feature_noise=noise).training
            trainer = bench.make_trainer(bench.SHAPES["tiny"], config, bench.Accelerator(cpu=True))
            torch.manual_seed(0)
            for parameter in trainer.alignment.parameters():
                torch.nn.init.zeros_(parameter) if zero else torch.nn.init.normal_(parameter, std=0.1)
            same = [make_talk(talk.id, len(talk.token_ids), 1, hidden=64) for talk in talks]
            trainer.head.weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
            losses.append(loop.train_step(trainer, [collate(same, config.align_steps)], 0).parts)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[2], losses[3])


def test_training_never_computes_in_float16(monkeypatch):
    """What `auto` is for a target on a GPU without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert compute_dtype("auto", torch.device("cuda")) == torch.float32


def test_features_of_another_target_are_refused(store, tiny_target):
    stranger = replace(tiny_target, identity=replace(tiny_target.identity, weights="other"))
    features = store_features(store, stranger)
    with pytest.raises(DraftMismatch, match=stranger.fingerprint):
        train_draft(settings(), features, store, tiny_target)


def test_a_missing_warm_start_is_named(store, tiny_target, features, tmp_path):
    draft = settings().draft.model_copy(update={"warm_start": str(tmp_path)})
    with pytest.raises(CorruptFile, match=r"warm_start: .*config\.json is missing"):
        train_draft(settings().model_copy(update={"draft": draft}), features, store, tiny_target)


def test_a_warm_start_continues_from_the_given_weights(trained, tiny_target):
    store, first = trained.store, trained.draft
    folder = Path(store.open(first).local_path("model.safetensors")).parent
    draft = settings().draft.model_copy(update={"warm_start": str(folder)})
    config = settings(max_steps=1, lr_peak=1e-12).model_copy(update={"draft": draft})
    second = train_draft(config, trained.features, store, tiny_target)
    for name, value in weights(store, second).items():
        torch.testing.assert_close(value, weights(store, first)[name], rtol=0, atol=1e-9)


def test_a_draft_that_training_makes_worse_is_kept_as_it_was(store, tiny_target, features, monkeypatch):
    first = train_draft(settings(max_steps=1), features, store, tiny_target)
    folder = Path(store.open(first).local_path("model.safetensors")).parent
    draft = settings().draft.model_copy(update={"warm_start": str(folder)})
    found = iter([2.0, 1.9])  # before the first step, and after the last
    monkeypatch.setattr(loop, "validate", lambda *given: {"val/tau": next(found)})
    second = train_draft(settings(max_steps=2).model_copy(update={"draft": draft}), features, store, tiny_target)
    assert (second.summary["steps"], second.summary["best_step"], second.summary["val/tau"]) == (2, 0, 2.0)
    assert all(torch.equal(value, weights(store, first)[name]) for name, value in weights(store, second).items())


TWO_STAGES = {**SETTINGS, "pretraining": SETTINGS["training"] | {"top_k_weight": 0.0, "passes": 2}}


def test_a_second_stage_starts_from_the_firsts_draft(store, tiny_target, features):
    told: list[str] = []
    config = parse_config({**TWO_STAGES, "training": SETTINGS["training"] | {"max_steps": 1, "lr_peak": 1e-12}})
    second = train_draft(config, features, store, tiny_target, lambda done, total, note: told.append(note))
    first = train_draft(parse_config({"training": TWO_STAGES["pretraining"]}), features, store, tiny_target)
    assert first.digest != second.digest
    assert first.summary["steps"] > second.summary["steps"] == 1
    assert [note[:6] for note in told] == ["1 of 2"] * first.summary["steps"] + [told[-1][:6]]
    assert not told[-1].startswith("1 of 2")
    for name, value in weights(store, second).items():
        torch.testing.assert_close(value, weights(store, first)[name], rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def two_stages_whole(tmp_path_factory, tiny_target) -> dict[str, torch.Tensor]:
    """The weights after two stages that nothing interrupted."""
    store = Store(tmp_path_factory.mktemp("two-stages"))
    return weights(store, train_draft(parse_config(TWO_STAGES), store_features(store, tiny_target), store, tiny_target))


@pytest.mark.parametrize("dies_in", [1, 2])
def test_two_stages_interrupted_in_either_continue_bit_for_bit(
    store, tiny_target, features, two_stages_whole, dies_in, monkeypatch
):
    config = parse_config(TWO_STAGES)
    take_step, top_k_weight = loop.train_step, (0.0, 1.0)[dies_in - 1]

    def fail(trainer, batches, step, stop):
        if step == 5 and trainer.config.top_k_weight == top_k_weight:
            raise KeyboardInterrupt
        return take_step(trainer, batches, step, stop)

    monkeypatch.setattr(loop, "train_step", fail)
    with pytest.raises(KeyboardInterrupt):
        train_draft(config, features, store, tiny_target)
    steps = []
    monkeypatch.setattr(loop, "train_step", lambda *given: steps.append(given[2]) or take_step(*given))
    resumed = weights(store, train_draft(config, features, store, tiny_target))
    assert steps[0] >= 4, "a checkpoint was there"
    assert steps.count(0) == 2 - dies_in, "the finished stage is not done again"
    assert all(torch.equal(value, two_stages_whole[name]) for name, value in resumed.items())


def test_a_draft_of_the_full_vocabulary_knows_which_tokens_the_answers_use_most(store, tiny_target, features):
    artifact = train_draft(settings(max_steps=1), features, store, tiny_target)
    draft = load_draft(Path(store.open(artifact).local_path("token_ranks.json")).parent, tiny_target)
    store.open(artifact).local_path("model.safetensors")
    dataset = FeatureDataset(store, features, "train")
    counts = sum(torch.bincount(c.token_ids[c.loss_mask], minlength=len(tiny_target.head)) for c in dataset)
    ends = list(tiny_target.eos_token_ids)
    assert draft.ranks is not None
    assert draft.ranks[: len(ends)].tolist() == sorted(ends)
    rest = counts[draft.ranks[len(ends) :]]
    assert (rest.diff() <= 0).all()
    assert draft.narrowed(20).head.token_ids.tolist() == sorted(draft.ranks[:20].tolist())
    assert draft.narrowed(None) is draft
