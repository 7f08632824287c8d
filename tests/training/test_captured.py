"""A step as a CUDA graph trains as the same step run eagerly."""

from dataclasses import replace

import pytest
import torch

from hass_core.bench import training as bench
from hass_core.draft_config import DraftConfig
from hass_core.training.batch import collate, rounded_up
from hass_core.training.losses import PARTS
from hass_core.training.step import GraphPerShape, Trainer, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = {"hidden": 64, "inner": 128, "heads": 4, "groups": 2, "head_dim": 32, "vocabulary": 512}
STEPS = 12
EAGLE3 = DraftConfig(architecture="eagle3", norm_output=True)


def trained(
    captured: bool, vocabulary: int | None = None, draft: DraftConfig = bench.EAGLE, **settings
) -> tuple[list[torch.Tensor], Trainer]:
    """Loss parts of some steps over batches of several shapes."""
    torch.manual_seed(0)
    config = bench.TrainingConfig.model_validate(
        {"tokens_per_pack": 256, "packs_per_step": 2, "lr_peak": 1e-3, "compile": captured, **settings}
    )
    trainer = bench.make_trainer(SHAPE, config, bench.Accelerator(), vocabulary, draft)
    batches = [collate(talks, config.align_steps) for talks in bench.make_talks(SHAPE, config, 60, 2, count=4)]
    batches = [
        rounded_up(replace(batch, ids=()), 1024 if i % 2 else 2048).pin_memory() for i, batch in enumerate(batches)
    ]
    of_step = [[batches[i % 4], batches[(i + 1) % 4]] for i in range(STEPS)]
    return [train_step(trainer, taken, i).parts.cpu() for i, taken in enumerate(of_step)], trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"feature_noise": 0.1},
        {"vocabulary": 300},
        {"optimizer": "muon"},
        {"align_steps": 1, "top_k_weight": 0.0},
        {"align_steps": 4, "recompute": True},
        {"draft": EAGLE3, "vocabulary": 300, "regression_weight": 0.0, "detach_features": False},
    ],
    ids=str,
)
def test_graphs_give_the_losses_of_eager_steps(settings):
    expected, _ = trained(captured=False, **settings)
    got, trainer = trained(captured=True, **settings)
    assert isinstance(trainer.backward, GraphPerShape)
    assert any(trainer.backward.graphs._captured.values())
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2, msg=lambda text, step=step: f"{step}: {text}")
    part = PARTS.index("top_k" if "draft" in settings else "regression")
    assert torch.stack(got)[-1, 0, part] < torch.stack(got)[0, 0, part]
