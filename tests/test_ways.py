"""The ways that docs/architecture.md shows, prompt to token and stored row to optimizer step: short, and what runs."""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hass_core.config import SamplingConfig, TrainingConfig, TreeConfig
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import SpeculativeDecoder
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import Draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import build_draft
from hass_core.features.reader import FeatureDataset
from hass_core.target_model.runner import make_runner
from hass_core.training.feed import Division, PackStream, Prefetcher, micro_batches
from hass_core.training.sharding import make_accelerator
from hass_core.training.step import Trainer, train_step
from hass_core.training.train import make_feed
from tests.training.conftest import store_features

CORE = Path(__file__).parents[1] / "hass_core"
TOKEN, STEP = "From a prompt to a token", "From a stored row to an optimizer step"
ASKED = {  # for one thing, by files of the ways: whether a GPU's kernels serve, whether there are several processes …
    *("kernels/__init__.py", "training/sharding.py", "draft_model/architecture.py"),
    *("features/sizes.py", "store/store.py"),  # … how long a row is, where a file lies
}


def files_of(way: str) -> set[str]:
    """The files that the section's table names."""
    section = (CORE.parent / "docs" / "architecture.md").read_text().partition(f"## {way}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"`([\w/]+\.py)`", section))


@contextmanager
def seen() -> Iterator[set[str]]:
    """The files of the core whose functions run within, in threads begun meanwhile too."""
    found: set[str] = set()

    def note(frame, event, argument) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(CORE):
            found.add(str(file.relative_to(CORE)))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.parametrize(("way", "most"), [(TOKEN, 10), (STEP, 12)])
def test_a_way_is_short_and_its_files_are_there(way, most):
    files = files_of(way)
    assert 0 < len(files) <= most
    assert [file for file in files if not (CORE / file).is_file()] == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_runs_the_files_of_a_tokens_way_and_no_others(tiny_target, temperature):
    model = build_draft(DraftArchitecture.from_target_config(tiny_target.config), tiny_target.embedding)
    draft = Draft(model.eval().requires_grad_(False), DraftHead.from_target(tiny_target.head), {})
    decoder = SpeculativeDecoder(make_runner(tiny_target), draft, TreeConfig(depth=3, top_k=4, nodes=12))
    asked = [5, 6, 7, 8], SamplingConfig(temperature=temperature), 12, StopRule.of(tiny_target)
    list(decoder.stream(*asked))  # allocates; what follows is what every later answer runs
    with seen() as files:
        list(decoder.stream(*asked))
    assert files - ASKED == files_of(TOKEN)


def test_training_runs_the_files_of_a_steps_way_and_no_others(store, tiny_target):
    dataset = FeatureDataset(store, store_features(store, tiny_target), "train")
    model = build_draft(DraftArchitecture.from_target_config(tiny_target.config), tiny_target.embedding)
    config = TrainingConfig(acceptance_weight=0.1, tokens_per_pack=64, dtype="float32")
    trainer = Trainer.of(
        config, 0, make_accelerator(tiny_target.device), model, DraftHead.from_target(tiny_target.head)
    )
    feed = make_feed(trainer, dataset, Division(1))
    with seen() as files:
        stream = PackStream(dataset.lengths, config.tokens_per_pack, 0, dataset.blocks)
        steps = Prefetcher(micro_batches(feed, stream, Division(1), 0))
        train_step(trainer, next(steps), 0)
        steps.close()
    assert files - ASKED == files_of(STEP) - {"training/loop.py"}  # which calls this
