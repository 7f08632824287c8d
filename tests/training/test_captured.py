"""A step as a CUDA graph trains as the same step run eagerly."""

from dataclasses import replace

import pytest
import torch

from hass_core.bench import training as bench
from hass_core.training.batch import collate
from hass_core.training.captured import Captured
from hass_core.training.loop import Run, train_step
from hass_core.training.padding import padded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = {"hidden": 64, "inner": 128, "heads": 4, "groups": 2, "head_dim": 32, "vocabulary": 512}
STEPS = 12


def trained(captured: bool, **settings) -> tuple[list[torch.Tensor], Run]:
    """Loss parts of some steps over batches of several shapes."""
    torch.manual_seed(0)
    config = bench.TrainingConfig.model_validate(
        {"tokens_per_pack": 256, "packs_per_batch": 2, "lr_peak": 1e-3, "compile": captured, **settings}
    )
    run = bench._make_run(SHAPE, config, bench.Accelerator(), None)
    batches = [collate(talks, config.align_steps) for talks in bench._talks(SHAPE, config, 60, count=4)]
    batches = [padded(replace(batch, ids=()), 64 if i % 2 else 128).pin_memory() for i, batch in enumerate(batches)]
    return [train_step(run, [batches[i % 4], batches[(i + 1) % 4]], i)[0].cpu() for i in range(STEPS)], run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"feature_noise": 0.1},
        {"optimizer": "muon"},
        {"align_steps": 1, "top_k_weight": 0.0},
        {"align_steps": 4, "recompute": True},
    ],
    ids=str,
)
def test_graphs_give_the_losses_of_eager_steps(settings):
    expected, _ = trained(captured=False, **settings)
    got, run = trained(captured=True, **settings)
    assert isinstance(run.backward, Captured)
    assert any(run.backward._graphs.values())
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2, msg=lambda text, step=step: f"{step}: {text}")
    assert torch.stack(got)[-1, 0, 0] < torch.stack(got)[0, 0, 0]
