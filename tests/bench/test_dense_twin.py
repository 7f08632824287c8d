"""The plain twin computes the loss and the gradient of the fast step."""

import pytest
import torch

from hass_core.bench.dense_twin import dense_loss, dense_outputs, side_by_side
from hass_core.draft_model.head import DraftHead
from hass_core.training.alignment import Alignment
from hass_core.training.batch import collate
from hass_core.training.losses import Objective, distill
from tests.training.conftest import HIDDEN, VOCABULARY, make_draft


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_plain_twin_gives_the_fast_steps_loss_and_gradients(talks, steps, recompute):
    objective = Objective(step_weights=(1.0, 0.5, 0.25, 0.125)[:steps])
    head = DraftHead(torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0)))
    fast, plain = make_draft(), make_draft()

    batch = collate(talks, steps)
    outputs = Alignment(fast, steps, recompute=recompute)(batch, batch.features)
    parts, gradients = distill(outputs, batch, head, objective, batch.counts)
    torch.autograd.backward(outputs, gradients)

    padded = side_by_side(talks)
    assert torch.equal(padded.supervised(steps).sum((1, 2)), batch.counts)
    loss = dense_loss(dense_outputs(plain, padded, padded.features, steps), padded, head, objective)
    loss.backward()

    torch.testing.assert_close(objective.combine(parts), loss.detach(), rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name} {m}")
