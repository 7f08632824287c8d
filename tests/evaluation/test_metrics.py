"""Every metric against a hand-worked example."""

import numpy as np
import pytest

from hass_core.evaluation import metrics
from hass_core.evaluation.metrics import Measurement


def measurement(accepted, question="q", method="hass", **changes):
    values = {
        "benchmark": "b",
        "question": question,
        "category": "c",
        "temperature": 0.0,
        "method": method,
        "prompt_tokens": 5,
        "new_tokens": sum(accepted) + len(accepted) + 1,
        "seconds": 2.0,
        "decode_seconds": 1.5,
        "accepted": accepted,
        "drafted_depth": [3] * len(accepted),
        "token_ids": [[]],
    }
    return Measurement(**(values | changes))


def value(sample):
    return float(sample.statistic(*sample.columns))


SHORT, LONG = measurement([3], "a"), measurement([0, 0, 0, 1], "b")


def test_macro_tau_counts_questions_and_micro_tau_cycles():
    assert value(metrics.tau_macro([SHORT, LONG])) == pytest.approx((4 + 1.25) / 2)
    assert value(metrics.tau_micro([SHORT, LONG])) == pytest.approx((4 + 5) / 5)


def test_the_gain_in_tau_is_taken_question_by_question():
    base = [measurement([1], "a", "eagle"), measurement([0, 1], "b", "eagle")]
    gain = metrics.tau_gain([SHORT, LONG], base)
    assert gain.columns[0].tolist() == pytest.approx([2, -0.25])


def test_an_answer_of_one_token_has_no_cycle_and_counts_as_plain():
    empty = measurement([], "a")
    assert value(metrics.tau_macro([empty, LONG])) == pytest.approx((1 + 1.25) / 2)
    assert value(metrics.tau_micro([empty, LONG])) == pytest.approx(5 / 4)


def test_acceptance_by_depth_is_a_share_of_cycles():
    assert [value(metrics.acceptance_at_depth([SHORT, LONG], d)) for d in (1, 2, 3)] == pytest.approx([0.4, 0.2, 0.2])


def test_n_alpha_is_a_share_of_the_tries_that_all_before_allowed():
    both = [measurement([2, 0, 1], "a"), measurement([3, 1], "b")]
    assert [value(metrics.n_alpha(both, n)) for n in (0, 1, 2)] == pytest.approx([4 / 5, 2 / 4, 1 / 2])


def test_a_level_that_was_not_drafted_is_no_try():
    short = measurement([1, 1], drafted_depth=[1, 2])
    assert value(metrics.n_alpha([short], 1)) == 0
    assert metrics.n_alpha([short], 1).columns[1].tolist() == [1]


def test_acceptance_by_rank_is_a_share_of_the_places_that_offered_it():
    # two cycles: three children then one, and two children of which none was accepted
    m = measurement([1, 0], ranks=[2], offered=[3, 1, 2])
    assert [value(metrics.acceptance_at_rank([m], r)) for r in (1, 2, 3)] == pytest.approx([0, 0, 1])
    assert metrics.acceptance_at_rank([m], 2).columns[1].tolist() == [2]
    assert metrics.widest([m]) == 3


def test_the_use_of_a_tree_tells_depth_and_choice_of_each_accepted_token():
    # four cycles in two answers: depth 1 accepts the first choice twice and the third once, depth 2 the second once
    first = measurement([2, 0], "a", drafted_depth=[2, 2], ranks=[0, 1], offered=[3, 2, 0, 3])
    second = measurement([1, 1], "b", drafted_depth=[2, 2], ranks=[2, 0], offered=[3, 2, 3, 2])
    assert metrics.tree_use([first, second]) == [[0.5, 0, 0.25], [0, 0.25, 0]]


def test_speed_up_is_the_ratio_of_total_rates():
    ours = [measurement([1], "a", new_tokens=10, seconds=1), measurement([1], "b", new_tokens=90, seconds=4)]
    plain = [
        measurement([0], "a", "plain", new_tokens=10, seconds=2),
        measurement([0], "b", "plain", new_tokens=90, seconds=8),
    ]
    assert value(metrics.speedup(ours, plain)) == pytest.approx(2)
    assert value(metrics.tokens_per_second(ours)) == pytest.approx(20)


def test_a_speed_up_is_only_taken_on_the_same_questions():
    with pytest.raises(AssertionError):
        metrics.speedup([measurement([1], "a")], [measurement([0], "b", "plain")])


def test_time_per_output_token_leaves_the_prefill_out():
    assert value(metrics.time_per_output_token([measurement([1], new_tokens=10)], 0.5)) == pytest.approx(150)


def test_columns_hold_one_number_per_question():
    for sample in (metrics.tau_macro([SHORT, LONG]), metrics.tokens_per_second([SHORT, LONG])):
        assert all(isinstance(c, np.ndarray) and c.shape == (2,) for c in sample.columns)
