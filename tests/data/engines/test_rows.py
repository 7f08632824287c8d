"""Rows with settings of their own draw from the right distribution, with the noise of their streams and positions."""

import math

import pytest
import torch

from hass_core.data.engines.batch import as_signed, draw_rows, shape_rows
from hass_core.sampling import nucleus_edge, stream

V = 700


def drawn(logits: torch.Tensor, count: int, temperature=1.0, top_p=1.0, top_k=0) -> torch.Tensor:
    """Counts [V] of `count` draws from one row of logits, at as many positions of one stream."""
    settings = torch.full((count,), temperature), torch.full((count,), top_p), torch.full((count,), top_k)
    shaped = shape_rows(logits.expand(count, -1), *settings, top_k, top_p < 1)
    ids = draw_rows(shaped, as_signed([stream(7, 0)] * count), torch.arange(count))
    return torch.bincount(ids, minlength=len(logits))


def chi_square_ok(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within five standard deviations of the chi-square's mean; cells with few expected draws are pooled."""
    total = counts.sum()
    common = expected * total >= 10
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).double() * total
    keep = wanted > 0
    statistic = ((observed - wanted) ** 2 / wanted.clamp(min=1e-12))[keep].sum()
    freedom = int(keep.sum()) - 1
    return bool(statistic < freedom + 5 * math.sqrt(2 * max(1, freedom))) and bool((observed[~keep] == 0).all())


LOGITS = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_softmax(temperature):
    assert chi_square_ok(drawn(LOGITS, 10_000, temperature), torch.softmax(LOGITS / temperature, 0))


def test_the_check_itself_notices_a_wrong_temperature():
    assert not chi_square_ok(drawn(LOGITS, 10_000, 0.9), torch.softmax(LOGITS, 0))


def test_top_k_keeps_the_k_likeliest():
    kept = torch.full((V,), -torch.inf).scatter(0, LOGITS.topk(5).indices, LOGITS.topk(5).values)
    assert chi_square_ok(drawn(LOGITS, 5_000, top_k=5), torch.softmax(kept, 0))


def test_top_p_keeps_the_smallest_set_with_that_mass():
    order = LOGITS.argsort(descending=True)
    mass = torch.softmax(LOGITS, 0)[order].cumsum(0)
    count = int((mass < 0.8).sum()) + 1
    kept = torch.full((V,), -torch.inf).scatter(0, order[:count], LOGITS[order[:count]])
    assert chi_square_ok(drawn(LOGITS, 10_000, top_p=0.8), torch.softmax(kept, 0))


def test_the_nucleus_edge_is_the_last_kept_logit():
    ranked = LOGITS.sort(descending=True).values
    p = LOGITS.softmax(0).sort(descending=True).values
    count = int((p.cumsum(0) < 0.9).sum()) + 1
    edge = nucleus_edge(LOGITS[None], torch.tensor([[0.9]]))
    assert ranked[count - 1] >= edge > ranked[count]


def test_each_row_has_its_own_settings():
    rows = LOGITS.expand(3, -1)
    settings = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1e-6, 1.0]), torch.tensor([0, 0, 1])
    ids = draw_rows(shape_rows(rows, *settings, 1, True), as_signed([stream(7, 0)] * 3), torch.arange(3))
    assert ids.tolist() == [int(LOGITS.argmax())] * 3


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    rows = torch.randn(6, V, generator=torch.Generator().manual_seed(1))
    streams, positions = as_signed([stream(seed, 0) for seed in range(6)]), torch.arange(6) * 5
    settings = torch.ones(6), torch.ones(6), torch.zeros(6, dtype=torch.long)
    together = draw_rows(shape_rows(rows, *settings, 0, False), streams, positions)
    alone = [
        draw_rows(shape_rows(rows[[i]], *(s[[i]] for s in settings), 0, False), streams[[i]], positions[[i]])
        for i in range(6)
    ]
    assert together.tolist() == torch.cat(alone).tolist()
