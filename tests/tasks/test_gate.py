"""The gate's rules, on measurements made by hand."""

import pytest

from hass_core.config import PromotionConfig
from hass_core.evaluation.metrics import Measurement
from tasks.gate import judge

RULES = PromotionConfig()


def measured(speedups: dict[str, list[float]], plain_seconds: float = 2.0) -> list[Measurement]:
    """One plain and one drafted measurement per question; the speed-up wobbles a little from question to question."""
    rows = []
    for benchmark, values in speedups.items():
        for number, value in enumerate(values):
            for method, seconds in (("plain", plain_seconds), ("hass", plain_seconds / value)):
                rows.append(
                    Measurement(
                        benchmark=benchmark, question=f"q{number}", category="any", temperature=0.0, method=method,
                        prompt_tokens=5, new_tokens=100, seconds=seconds, decode_seconds=seconds,
                        accepted=[1], drafted_depth=[3], token_ids=[[1]],
                    )
                )  # fmt: skip
    return rows


def around(value: float, questions: int = 12) -> list[float]:
    return [value * (1 + 0.01 * (number % 3 - 1)) for number in range(questions)]


def test_a_faster_lossless_challenger_is_promoted():
    verdict = judge(measured({"a": around(1.6)}), measured({"a": around(1.5)}), True, RULES)
    assert verdict.promoted
    assert verdict.gain is not None
    assert verdict.gain.value == pytest.approx(1.6 / 1.5 - 1, rel=1e-3)


def test_a_lossy_challenger_is_refused_however_fast():
    verdict = judge(measured({"a": around(3)}), measured({"a": around(1.5)}), False, RULES)
    assert not verdict.promoted
    assert verdict.reasons == ("the challenger changes the target's output: it is not lossless",)


def test_the_lower_end_of_the_interval_must_exceed_the_margin():
    challenger, champion = measured({"a": around(1.6)}), measured({"a": around(1.5)})
    verdict = judge(challenger, champion, True, PromotionConfig(margin=0.10))
    assert not verdict.promoted
    assert "lower end is not above the margin of +10.0%" in verdict.reasons[0]


def test_an_uncertain_gain_is_no_gain():
    noisy = [1.0, 2.4, 1.1, 2.2, 1.3, 1.9]
    verdict = judge(measured({"a": noisy}), measured({"a": around(1.5, 6)}), True, RULES)
    assert not verdict.promoted


def test_one_benchmark_may_not_pay_for_another():
    challenger = measured({"chat": around(2.0, 30), "code": around(1.3, 5)})
    champion = measured({"chat": around(1.5, 30), "code": around(1.5, 5)})
    verdict = judge(challenger, champion, True, RULES)
    assert not verdict.promoted
    assert verdict.reasons == ("code is 13.3% slower than with the champion; 2.0% are allowed",)


def test_a_busier_machine_on_one_day_does_not_decide():
    slow_day = measured({"a": around(1.5)}, plain_seconds=6.0)
    assert judge(measured({"a": around(1.6)}), slow_day, True, RULES).promoted


def test_only_common_questions_count():
    verdict = judge(measured({"a": around(1.6)}), measured({"b": around(1.5)}), True, RULES)
    assert not verdict.promoted
    assert verdict.reasons == ("the two drafts were measured on no common question",)


def test_equal_drafts_keep_the_champion():
    same = measured({"a": around(1.5)})
    assert not judge(same, same, True, RULES).promoted


def test_the_verdict_reads_as_a_table_with_intervals():
    challenger = measured({"chat": around(1.6), "my_code": around(1.5)})
    verdict = judge(challenger, measured({"chat": around(1.5), "my_code": around(1.5)}), True, RULES)
    text = verdict.model_copy(update={"challenger": "4", "champion": "3"}).markdown()
    assert "## Version 4: promoted, it replaces version 3" in text
    assert "| chat | +6.7%, 95 % interval +6.7% to +6.7% |" in text
    assert "| my\\_code | +0.0%, " in text
    assert "| all | +3.2%, " in text


def test_a_benchmark_has_the_interval_of_its_own_questions():
    noisy, calm = [1.4, 1.6, 1.5, 1.9, 1.3, 1.7], around(1.6, 6)
    verdict = judge(measured({"a": noisy, "b": calm}), measured({"a": calm, "b": calm}), True, RULES)
    gains = verdict.gains()
    assert list(gains) == ["a", "b", "all"]
    assert gains["a"].low < gains["a"].value < gains["a"].high
    assert gains["b"].low == gains["b"].value == gains["b"].high == 0
