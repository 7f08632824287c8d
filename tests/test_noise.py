"""The noise: its law, its independence, its bits, and the tokens that win with it."""

import itertools

import numpy as np
import pytest
import torch

from hass_core.config import SamplingConfig
from hass_core.decoding.sampler import Proposal, Sampler
from hass_core.sampling import MOST_NOISE, gumbel, gumbel_of, position_key, stream, winner

TOKENS = np.arange(4096, dtype=np.uint32)


def uniform(noise: np.ndarray) -> np.ndarray:
    return np.exp(-np.exp(-noise.astype(np.float64)))


def chi_square_deviation(observed: np.ndarray, expected: float) -> float:
    """In standard deviations."""
    freedom = observed.size - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


def test_it_is_what_two_exact_logarithms_make_of_the_bits():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[:6] = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1]
    w = ((bits & np.uint32(0x7FFFFFFF)).astype(np.float64) + 0.5) / 2**32
    exact = -np.log(np.where(bits >> 31, -np.log(w), -np.log1p(-w)))
    assert np.abs(gumbel_of(bits) - exact).max() < 2e-6
    assert gumbel_of(bits).max() < MOST_NOISE


def test_its_bits_are_the_same_on_every_machine():
    words = gumbel(stream(7, 3), 11, np.array([0, 1, 49151, 128255], np.uint32)).view(np.uint32)
    assert [hex(word) for word in words.tolist()] == ["0xbf5b07eb", "0x401cd772", "0x3ea775d8", "0xbe095b12"]


def test_it_is_even_over_tokens_positions_rows_and_seeds():
    def values(seed, row, position):
        return uniform(gumbel(stream(seed, row), position, TOKENS))

    for places in (
        [(0, 0, position) for position in range(40)],
        [(0, row, 5) for row in range(40)],
        [(seed, 0, 5) for seed in range(40)],
    ):
        u = np.concatenate([values(*place) for place in places])
        assert abs(chi_square_deviation(np.histogram(u, 256, (0, 1))[0], u.size / 256)) < 5
        assert abs(chi_square_deviation(np.histogram(u, 64, (1 - 2**-6, 1))[0], u.size / 4096)) < 5  # winners' end


def test_neighbours_are_independent():
    draws = {
        "positions": [gumbel(stream(0, 0), position, TOKENS) for position in range(60)],
        "rows": [gumbel(stream(0, row), 0, TOKENS) for row in range(60)],
        "seeds": [gumbel(stream(seed, 0), 0, TOKENS) for seed in range(60)],
        "tokens": list(np.stack([gumbel(stream(0, 0), position, TOKENS[:60]) for position in range(4096)], 1)),
    }
    for name, noise in draws.items():
        correlation = np.corrcoef(np.stack(noise))
        np.fill_diagonal(correlation, 0)
        assert np.abs(correlation).max() < 6 / 4096**0.5, name
        # beyond correlation: pairs of neighbours fill a 16 × 16 board evenly
        u = np.stack([uniform(n) for n in noise])
        pairs = np.histogram2d(u[:-1].ravel(), u[1:].ravel(), 16, ((0, 1), (0, 1)))[0]
        assert abs(chi_square_deviation(pairs, pairs.sum() / 256)) < 5, name


def test_no_two_positions_of_a_row_share_a_key():
    keys = {int(position_key(stream(1, 0), position)[0]) for position in range(20_000)}
    assert len(keys) == 20_000


def test_seeds_and_rows_of_any_size_have_streams():
    assert len({stream(seed, row) for seed in (-1, 0, 2**31, 2**63, 2**64 - 2) for row in range(3)}) == 15
    assert stream(2**64 + 5, 1) == stream(5, 1)


def test_the_winner_among_those_that_can_win_is_the_winner_of_all():
    generator = np.random.default_rng(0)
    for position, scale in itertools.product(range(20), (0.0, 1.0, 10.0, 40.0)):
        logits = (generator.standard_normal(4096) * scale).astype(np.float32)
        assert winner(logits, stream(3, 1), position) == int((logits + gumbel(stream(3, 1), position, TOKENS)).argmax())


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e-3])
def test_near_temperature_zero_the_likeliest_token_wins(temperature):
    logits = torch.randn(1, 50, 300, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(SamplingConfig(temperature=temperature), 1, 300, torch.device("cpu"))
    sampler.start(torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]), seed=0)
    gap = logits.topk(2).values.diff().abs()[..., 0]
    tokens, _ = sampler.draw(logits, torch.arange(50)[None])
    assert torch.equal(tokens[gap > 26 * temperature], logits.argmax(-1)[gap > 26 * temperature])


def test_of_tied_tokens_the_lower_wins():
    sampler = Sampler(SamplingConfig(temperature=1e-5), 1, 5, torch.device("cpu"))
    sampler.start(torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]), seed=0)
    huge = torch.tensor([0.0, 3e3, 1.0, 3e3, 2.0])  # times 1e5 no digit is left for the noise
    assert sampler.draw(huge.expand(1, 20, -1), torch.arange(20)[None])[0].tolist() == [[1] * 20]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_candidates_hold_the_draw_as_often_as_theory_says(k):
    """P = Σ p_i E_t P[fewer than k of the others outrun i], see the note on closed forms: here by its simulation."""
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(12, generator=generator).mul(1.5).softmax(0) for _ in range(2))
    count = 8000
    sampler = Sampler(SamplingConfig(temperature=1.0), count, 12, torch.device("cpu"))
    sampler.start(torch.zeros(count, 1, dtype=torch.long), torch.ones(count, dtype=torch.long), seed=0)
    position = torch.zeros(count, dtype=torch.long)
    drawn, _ = sampler.draw(p.log().expand(count, 1, -1), position[:, None])
    _, guessed = sampler.guess(Proposal(q.log().expand(count, 1, -1), position, 0, k))
    hits = int((guessed[:, 0] == drawn).any(-1).sum())
    ratio = p / q
    lead = (ratio[:, None] * q - p).clamp(min=0)  # Λ's parts: how much faster j runs under q, if i wins under p
    times = torch.empty(20_000, dtype=torch.float64).exponential_(generator=generator)
    outrun = torch.bernoulli(1 - torch.exp(-times[:, None, None] * lead), generator=generator).sum(-1)  # [t, i]
    expected = float((p * (outrun < k).double().mean(0)).sum())
    assert hits / count == pytest.approx(expected, abs=0.02)
    if k == 1:
        assert expected == pytest.approx(float((p / (1 + lead.sum(-1))).sum()), abs=0.01)
