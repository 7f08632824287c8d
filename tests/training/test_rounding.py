"""Rounding a batch up changes its shape and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hass_core.draft_model.head import DraftHead
from hass_core.training.alignment import Alignment
from hass_core.training.batch import Batch, collate, rounded_up
from hass_core.training.losses import Objective, distill
from hass_core.training.step import shape_of
from tests.training.conftest import VOCABULARY, Talk, make_draft, make_talk

STEPS = 3


def loss_and_gradients(batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    draft = make_draft().to(dtype)
    head = DraftHead.from_target(torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(1)).to(dtype))
    outputs = Alignment(draft, STEPS)(batch, batch.features.to(dtype))
    parts, gradients = distill(outputs, batch, head, Objective(), batch.counts)
    torch.autograd.backward(outputs, gradients)
    return parts, {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}


@st.composite
def conversations(draw) -> list[Talk]:
    """A few conversations, some with several answers."""
    talks = []
    for i in range(draw(st.integers(1, 5))):
        length = draw(st.integers(8, 150))
        talk = make_talk(f"talk-{i}", length, draw(st.integers(1, 6)), seed=i)
        talk.loss_mask[length // 2 : length // 2 + draw(st.integers(0, length // 4))] = False
        talks.append(talk)
    return talks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["plain kernel", "flash kernel"])
@given(talks=conversations(), step=st.sampled_from([16, 100]))
def test_a_padded_batch_has_the_loss_and_the_gradients_of_its_conversations(dtype, talks, step):
    batch = collate(talks, STEPS)
    parts, gradients = loss_and_gradients(batch, dtype)
    more = rounded_up(batch, 16 * step)
    assert (more.rows % step, len(more.anchors) % step, len(more.targets) % step) == (0, 0, 0)
    assert (more.num_tokens, more.counts.tolist()) == (batch.num_tokens, batch.counts.tolist())
    padded_parts, padded_gradients = loss_and_gradients(more, dtype)
    torch.testing.assert_close(padded_parts, parts)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_batches_of_about_one_size_get_one_shape():
    batches = [collate([make_talk("a", 50 + i, 5), make_talk("b", 35 + i, 7)], STEPS) for i in range(3)]
    assert len({shape_of(batch) for batch in batches}) == 3
    assert len({shape_of(rounded_up(batch, 1024)) for batch in batches}) == 1
