"""Intervals hold the true value as often as they say, on data whose truth is known."""

import numpy as np
import pytest

from hass_core.evaluation.statistics import (
    bootstrap,
    mean,
    quantile,
    ratio_of_rates,
    ratio_of_sums,
)


def coverage(draw, statistic, truth, datasets=400, resamples=400):
    generator = np.random.default_rng(7)
    hits = 0
    for number in range(datasets):
        estimate = bootstrap(statistic, *draw(generator), resamples=resamples, seed=number)
        hits += estimate.low <= truth <= estimate.high
    return hits / datasets


def test_the_interval_of_a_mean_covers_the_truth_in_95_of_100_cases():
    assert 0.91 <= coverage(lambda g: (g.normal(3.0, 1.0, 40),), mean, 3.0) <= 0.98


def test_the_interval_of_a_skewed_mean_still_covers_it():
    assert 0.89 <= coverage(lambda g: (g.exponential(2.0, 50),), mean, 2.0) <= 0.98


def test_the_interval_of_a_ratio_of_sums_covers_the_true_rate():
    def answers(generator):
        cycles = generator.integers(20, 80, 40)
        return generator.binomial(cycles, 0.4), cycles

    assert 0.91 <= coverage(answers, ratio_of_sums, 0.4) <= 0.98


def test_a_ratio_of_sums_is_no_mean_of_ratios():
    assert ratio_of_sums(np.array([1.0, 90.0]), np.array([10.0, 100.0])) == pytest.approx(91 / 110)


def test_a_rate_over_no_attempts_is_zero():
    assert ratio_of_sums(np.zeros(3), np.zeros(3)) == 0


def test_pairing_removes_what_is_common_to_both_methods():
    generator = np.random.default_rng(1)
    tokens = np.full(40, 100.0)
    plain = generator.lognormal(0, 0.8, 40)  # questions differ far more than methods
    fast = plain / (1.5 + generator.normal(0, 0.02, 40))
    paired = bootstrap(ratio_of_rates, tokens, fast, tokens, plain)
    shuffled = bootstrap(ratio_of_rates, tokens, fast, tokens, generator.permutation(plain))
    assert paired.low < 1.5 < paired.high
    assert paired.high - paired.low < (shuffled.high - shuffled.low) / 5


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(mean, values, seed=3) == bootstrap(mean, values, seed=3)
    assert bootstrap(mean, values, seed=3) != bootstrap(mean, values, seed=4)


def test_constant_values_and_a_single_question_have_no_spread():
    for values in (np.full(10, 2.5), np.array([2.5])):
        estimate = bootstrap(mean, values)
        assert (estimate.value, estimate.low, estimate.high) == (2.5, 2.5, 2.5)


def test_resamples_are_the_same_however_they_are_cut_into_chunks(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    whole = bootstrap(mean, values, resamples=500)
    monkeypatch.setattr("hass_core.evaluation.statistics.ELEMENTS_PER_CHUNK", 100)
    assert bootstrap(mean, values, resamples=500) == whole


def test_a_quantile_has_an_interval_too():
    estimate = bootstrap(quantile(0.95), np.arange(200.0))
    assert estimate.value == pytest.approx(189.05)
    assert estimate.low < estimate.value < estimate.high
