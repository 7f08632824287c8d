"""Training with the target beside the draft, nothing stored: the same batches, the same losses."""

import json

import pytest

from hass_core.config import parse_config
from hass_core.errors import NonFinite
from hass_core.features.checks import validate_features
from hass_core.features.extract import extract_features
from hass_core.features.live import LiveFeatures, with_features
from hass_core.features.reader import FeatureDataset
from hass_core.training.train import train_draft
from tests.features.conftest import conversation, responses_artifact

TRAINING = {
    "align_steps": 2,
    "passes": 3,
    "tokens_per_pack": 96,
    "packs_per_step": 2,
    "log_every_steps": 1,
    "validate_every_steps": 4,
}


@pytest.fixture
def stages(store, tiny_target):
    """(settings, features) with the features stored, and with none."""
    rows = [conversation(f"c{i}", answer="word " * (i % 7 + 1) + "end") for i in range(24)]
    responses = responses_artifact(store, rows, parts=2)
    found = []
    for encoding in ("bf16", "none"):
        features = {"encoding": encoding, "validation_fraction": 0.2, "max_tokens_per_batch": 128}
        config = parse_config({"features": features, "training": TRAINING, "draft": {"vocab_size": 64}})
        found.append((config, extract_features(config, responses, store, tiny_target)))
    return found


def curve(store, artifact) -> list[dict]:
    return [json.loads(line) for line in store.open(artifact).read_text("metrics.jsonl").splitlines()]


def test_the_same_batches_give_the_same_losses(stages, store, tiny_target):
    curves = [curve(store, train_draft(config, features, store, tiny_target)) for config, features in stages]
    stored, live = curves
    assert len(stored) == len(live) > 5
    for one, other in zip(stored, live, strict=True):
        assert (other["step"], other["tokens_seen"]) == (one["step"], one["tokens_seen"])
        for name in one.keys() & {"train/loss", "train/regression", "train/soft_ce", "train/top_k", "val/loss"}:
            # a row's features may round differently to bfloat16 beside other rows
            assert other[name] == pytest.approx(one[name], rel=1e-3 if one["step"] == 1 else 1e-2), name


def test_rows_computed_together_equal_the_stored_ones_alone(stages, store, tiny_target):
    (_, stored), (_, bare) = stages
    expected = FeatureDataset(store, stored)
    live = with_features(FeatureDataset(store, bare), tiny_target, max_tokens_per_batch=100)
    assert isinstance(live, LiveFeatures)
    assert (live.lengths == expected.lengths).all()
    order = [5, 0, 11, 3, 7]
    for index, row in zip(order, live.many(order), strict=True):
        assert row.id == expected[index].id
        assert (row.features.float() - expected[index].features.float()).abs().max() <= 2e-2  # bfloat16's last place


def test_no_feature_is_stored_and_the_stage_is_sound(stages, store):
    (_, stored), (_, bare) = stages
    assert bare.summary["bytes"] < stored.summary["bytes"] / 3
    assert validate_features(store, bare).problems == []


def test_a_target_that_overflows_is_named_while_training(stages, store, tiny_target, monkeypatch):
    config, bare = stages[1]
    monkeypatch.setattr(tiny_target.model.model.norm, "forward", lambda hidden: hidden * float("nan"))
    with pytest.raises(NonFinite, match=r"conversation c\d+: the target's hidden states are NaN"):
        train_draft(config, bare, store, tiny_target)
