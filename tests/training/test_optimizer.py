"""What an optimizer step does with gradients and rates, and which weights are kept."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hass_core.bench import training as bench
from hass_core.training import loop
from hass_core.training.batch import collate
from hass_core.training.checkpoint import checkpoints
from hass_core.training.step import MovingAverage, learning_rate
from hass_core.training.train import draft_folder, train_draft
from tests.training.conftest import make_talk, store_features
from tests.training.test_train import settings


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 1 / 90), ("cosine", 0.5, 0.0)],
)
def test_the_rate_warms_up_in_a_line_and_then_follows_its_schedule(schedule, middle, last):
    config = settings(lr_peak=1e-3, warmup_fraction=0.1, schedule=schedule).training
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(1e-3 * middle)
    assert rates[99] == pytest.approx(1e-3 * last, abs=1e-6)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def gradients_at_the_update(**training: object) -> list[torch.Tensor]:
    """The gradients that the optimizer of one step sees."""
    config, seen = settings(feature_noise=0.0, **training).training, []
    torch.manual_seed(0)
    trainer = bench.make_trainer(bench.SHAPES["tiny"], config, bench.Accelerator(cpu=True))
    parameters = list(trainer.alignment.parameters())
    trainer.optimizers[0].step = lambda: seen.extend(p.grad.clone() for p in parameters)  # pyright: ignore
    talks = [make_talk(f"t{i}", 20 + i, 3, seed=i, hidden=64) for i in range(3)]
    loop.train_step(trainer, [collate(talks, config.align_steps)], 0)
    return seen


def test_gradients_are_clipped_by_their_norm_and_on_request_by_element():
    whole = gradients_at_the_update(clip_norm=None)
    norm = torch.stack([g.norm() for g in whole]).norm()
    limit = float(norm) / 3
    by_norm = gradients_at_the_update(clip_norm=limit)
    for clipped, gradient in zip(by_norm, whole, strict=True):
        torch.testing.assert_close(clipped, gradient / 3)
    for same, gradient in zip(gradients_at_the_update(clip_norm=2 * float(norm)), whole, strict=True):
        assert torch.equal(same, gradient)
    bound = float(max(g.abs().max() for g in whole)) / 2
    for clipped, gradient in zip(gradients_at_the_update(clip_norm=None, clip_value=bound), whole, strict=True):
        torch.testing.assert_close(clipped, gradient.clamp(-bound, bound))


def test_the_moving_average_forgets_its_start_and_changes_places_with_the_weights():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)  # the start
    average = MovingAverage(model, decay=0.9)
    expected = 100.0
    for step in range(40):
        nn.init.constant_(model.weight, float(step))
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert 20 < expected < 39
    average.swap(model)
    assert (model.weight.item(), average.weights["weight"].item()) == (pytest.approx(expected, rel=1e-5), 39.0)
    average.swap(model)
    assert model.weight.item() == 39.0


def test_training_stops_when_validation_no_longer_improves_and_keeps_the_best(store, tiny_target, monkeypatch):
    """`val/tau` is best at the second validation: two worse ones later training ends, and the second's draft stays."""
    taus, validated = iter([1.5, 1.7, 1.6, 1.65, 9.0]), []

    def validate(alignment, *_):
        validated.append(alignment.draft.fc.weight.detach().clone())
        return {"val/tau": next(taus)}

    monkeypatch.setattr(loop, "validate", validate)
    config = settings(
        passes=50, validate_every_steps=3, checkpoint_every_steps=2, keep_checkpoints=1, early_stop_validations=2
    )
    folder = draft_folder(config, store_features(store, tiny_target), store, tiny_target)
    in_place: list[list[str]] = []
    save = loop._save
    monkeypatch.setattr(loop, "_save", lambda *given: (save(*given), in_place.append(checkpoints(folder)))[0])
    artifact = train_draft(config, store_features(store, tiny_target), store, tiny_target)
    assert artifact.summary["steps"] == 12
    assert artifact.summary["best_step"] == 6
    assert max(map(len, in_place)) == 2, "the last and the best"
    assert in_place[-1] == ["checkpoint-0000006.safetensors", "checkpoint-0000012.safetensors"]
    kept = load_file(store.open(artifact).local_path("model.safetensors"))
    assert torch.equal(kept["fc.weight"], validated[1])
    records = [json.loads(line) for line in store.open(artifact).read_text("metrics.jsonl").splitlines()]
    assert [r["val/tau"] for r in records if "val/tau" in r] == [1.5, 1.7, 1.6, 1.65]
