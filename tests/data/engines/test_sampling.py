"""Tokens are drawn from the right distribution, by numbers that depend on seed and position alone."""

import math

import pytest
import torch

from hass_core.decoding.sampling import draw_weighted, nucleus_edge, sample_rows, uniform_at

V = 700  # not a multiple of the chunk


def uniforms(count: int) -> torch.Tensor:
    return uniform_at(torch.full((count,), 7), torch.arange(count))


def drawn(logits: torch.Tensor, count: int, temperature=1.0, top_p=1.0, top_k=0) -> torch.Tensor:
    """Counts [V] of `count` draws from one row of logits."""
    rows = logits.expand(count, -1)
    settings = torch.full((count,), temperature), torch.full((count,), top_p), torch.full((count,), top_k)
    ids = sample_rows(rows.clone(), *settings, uniforms(count), top_k, top_p < 1)
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
    assert chi_square_ok(drawn(LOGITS, 20_000, temperature), torch.softmax(LOGITS / temperature, 0))


def test_the_check_itself_notices_a_wrong_temperature():
    assert not chi_square_ok(drawn(LOGITS, 20_000, 0.9), torch.softmax(LOGITS, 0))


def test_top_k_keeps_the_k_likeliest():
    kept = torch.full((V,), -torch.inf).scatter(0, LOGITS.topk(5).indices, LOGITS.topk(5).values)
    assert chi_square_ok(drawn(LOGITS, 5_000, top_k=5), torch.softmax(kept, 0))


def test_top_p_keeps_the_smallest_set_with_that_mass():
    order = LOGITS.argsort(descending=True)
    mass = torch.softmax(LOGITS, 0)[order].cumsum(0)
    count = int((mass < 0.8).sum()) + 1
    kept = torch.full((V,), -torch.inf).scatter(0, order[:count], LOGITS[order[:count]])
    assert chi_square_ok(drawn(LOGITS, 20_000, top_p=0.8), torch.softmax(kept, 0))


def test_the_nucleus_edge_is_the_last_kept_score():
    scores = torch.log_softmax(LOGITS, 0)
    scores = (scores - scores.max())[None]
    ranked = scores[0].sort(descending=True).values
    count = int((ranked.exp().cumsum(0) < 0.9 * ranked.exp().sum()).sum()) + 1
    edge = nucleus_edge(scores, torch.tensor([0.9]))
    assert ranked[count - 1] >= edge > ranked[count]


def test_each_row_has_its_own_settings():
    rows = LOGITS.expand(3, -1).clone()
    settings = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1e-6, 1.0]), torch.tensor([0, 0, 1])
    ids = sample_rows(rows, *settings, uniforms(3), 1, True)
    assert ids.tolist() == [int(LOGITS.argmax())] * 3


def test_no_token_of_zero_weight_is_ever_drawn():
    weights = torch.zeros(4, V)
    weights[:, 300] = 1.0
    assert draw_weighted(weights, torch.tensor([0.0, 0.3, 0.999, 1 - 2**-24])).tolist() == [300] * 4


def test_the_random_numbers_are_even_and_depend_on_seed_and_position_only():
    numbers = uniforms(20_000)
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    counts = torch.histc(numbers, 20, 0, 1)
    assert chi_square_ok(counts, torch.full((20,), 1 / 20))
    assert uniform_at(torch.tensor([3, 7]), torch.tensor([5, 11]))[1] == numbers[11]
    assert len(set(uniform_at(torch.arange(100), torch.zeros(100, dtype=torch.long)).tolist())) == 100
