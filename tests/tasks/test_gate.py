"""The gate's rules, on bouts made by hand, and its errors, on bouts drawn with a busy machine's noise."""

import numpy as np
import pytest

from hass_core.config import PromotionConfig
from hass_core.evaluation.duel import Bout
from hass_core.evaluation.metrics import Measurement
from tasks.gate import Verdict, judge

RULES = PromotionConfig()
QUESTIONS = 80  # what `heldout` holds and evaluation.max_questions takes by default
ROUNDS = RULES.rounds
TEMPERATURES = (0.0, 1.0)


def side(benchmark: str, question: int, temperature: float, seconds: float, compilations: int = 0) -> Measurement:
    return Measurement.model_construct(
        benchmark=benchmark, question=f"q{question}", temperature=temperature, new_tokens=100, seconds=seconds,
        compilations=compilations,
    )  # fmt: skip


def fought(gains: dict[str, list[float]], rounds: int = ROUNDS, by_temperature: tuple[float, float] = (1.0, 1.0)):
    """Bouts whose challenger answers so many times as fast, by benchmark and question; both slow down with time."""
    return [
        Bout.model_construct(
            round=lap,
            challenger=side(name, q, t, (2 + lap) / (gain * by_temperature[t > 0])),
            opponent=side(name, q, t, 2 + lap),
        )
        for lap in range(rounds)
        for t in TEMPERATURES
        for name, values in gains.items()
        for q, gain in enumerate(values)
    ]


def around(value: float, questions: int = 12) -> list[float]:
    return [value * (1 + 0.01 * (number % 3 - 1)) for number in range(questions)]


def test_a_faster_lossless_challenger_is_promoted():
    verdict = judge(fought({"a": around(1.07)}), True, RULES)
    assert verdict.promoted
    assert verdict.gain is not None
    assert verdict.gain.value == pytest.approx(0.07, abs=1e-3)


def test_a_lossy_challenger_is_refused_however_fast():
    verdict = judge(fought({"a": around(3)}), False, RULES)
    assert not verdict.promoted
    assert verdict.reasons == ("the challenger changes the target's output: it is not lossless",)


def test_the_lower_end_of_the_interval_must_exceed_the_margin():
    verdict = judge(fought({"a": around(1.07)}), True, PromotionConfig(margin=0.10))
    assert not verdict.promoted
    assert "lower end is not above the margin of +10.0%" in verdict.reasons[0]


def test_an_uncertain_gain_is_no_gain():
    assert not judge(fought({"a": [0.7, 1.6, 0.8, 1.5, 0.9, 1.3]}), True, RULES).promoted


def test_one_benchmark_may_not_pay_for_another():
    verdict = judge(fought({"chat": around(1.3, 30), "code": around(0.9, 6)}), True, RULES)
    assert not verdict.promoted
    assert verdict.reasons == ("code is 10.0% slower than with the champion; 2.0% are allowed",)


def test_one_temperature_may_not_pay_for_another():
    verdict = judge(fought({"a": around(1.0)}, by_temperature=(1.3, 0.95)), True, RULES, "version 3, the champion")
    assert not verdict.promoted
    assert verdict.reasons == ("T = 1 is 5.0% slower than with version 3, the champion; 2.0% are allowed",)


def test_a_round_that_favours_one_side_widens_the_interval():
    calm = judge(fought({"a": around(1.03)}), True, RULES)
    swaying = [
        bout.model_copy(
            update={"challenger": bout.challenger.model_copy(update={"seconds": bout.challenger.seconds * sway})}
        )
        for bout in fought({"a": around(1.03)})
        for sway in ([0.98, 1.0, 1.02][bout.round],)
    ]
    assert calm.promoted
    assert not judge(swaying, True, RULES).promoted


def test_times_with_a_compilation_in_them_decide_nothing():
    bouts = fought({"a": around(1.5)})
    spoilt = bouts[0].model_copy(update={"opponent": side("a", 0, 0.0, 2.0, compilations=1)})
    verdict = judge([spoilt, *bouts[1:]], True, RULES)
    assert not verdict.promoted
    assert verdict.reasons[0].startswith("1 compilations ran while the clock did")


@pytest.mark.parametrize("rounds", [1, ROUNDS])
def test_one_question_promotes_nobody(rounds):
    verdict = judge(fought({"a": [1.5]}, rounds=rounds), True, RULES)
    assert not verdict.promoted
    assert verdict.reasons[0].startswith("one question says nothing of others")


def test_a_gain_that_is_no_number_promotes_nobody():
    assert not judge(fought({"a": [float("nan")] * 12}), True, RULES).promoted


def test_no_bouts_promote_nobody():
    assert judge([], True, RULES).reasons == ("no question was answered by both sides",)


def test_the_verdict_reads_as_a_table_with_benchmarks_temperatures_and_intervals():
    verdict = judge(fought({"chat": around(1.06), "my_code": around(1.0)}, by_temperature=(1.01, 0.99)), True, RULES)
    text = verdict.model_copy(update={"challenger": "4", "champion": "3"}).markdown()
    assert "## Version 4: promoted, it replaces version 3" in text
    assert "| chat | +6.0%, 95 % interval" in text
    assert "| my\\_code | " in text
    assert "| T = 0 | +" in text
    assert "| T = 1 | +" in text
    assert "| all | +" in text
    assert "24 questions, answered in turns by both sides in 3 rounds of one session with the same tree;" in text
    assert "in 1 round of one session" in judge(fought({"chat": around(1.06)}, rounds=1), True, RULES).measured


def drawn(seed: int, gain: float, own: float) -> list[Bout]:
    """A duel on a busy machine. Both sides share its drift (a random walk with jumps); each answer has noise of 5 %,
    and one in a hundred takes three times as long; where memory lies favours a side by 1 % for as long as its decoders
    live; a different draft is better by `gain`, by other amounts (σ `own`) from question to question and text to text.
    """
    random, level, bouts = np.random.default_rng(seed), 0.0, []
    for_question = random.normal(0, own, QUESTIONS)
    for lap in range(ROUNDS):
        for temperature in TEMPERATURES:
            place = random.normal(0, 0.01)
            for question in range(QUESTIONS):
                level = 0.995 * level + random.normal(0, 0.02) + (random.random() < 0.01) * random.normal(0, 0.15)
                noise = random.normal(0, 0.05, 2) + np.log(3) * (random.random(2) < 0.01)
                better = np.log1p(gain) + place + for_question[question] + (temperature > 0) * random.normal(0, own)
                ours, theirs = np.exp(level + noise - [better, 0])
                bouts.append(
                    Bout.model_construct(
                        round=lap,
                        challenger=side("heldout", question, temperature, ours),
                        opponent=side("heldout", question, temperature, theirs),
                    )
                )
    return bouts


def promoted(gain: float, own: float) -> int:
    return sum(judge(drawn(seed, gain, own), True, RULES).promoted for seed in range(100))


def test_a_copy_of_the_champion_is_promoted_in_at_most_two_of_a_hundred_trials():
    assert promoted(gain=0.0, own=0.0) <= 2


def test_another_draft_that_is_no_better_is_promoted_in_at_most_two_of_a_hundred_trials():
    assert promoted(gain=0.0, own=0.06) <= 2


def test_a_draft_that_is_five_percent_better_is_found():
    assert promoted(gain=0.05, own=0.06) >= 90


def test_a_reason_that_a_person_wrote_shows_as_it_is_and_makes_no_markup():
    reason = "slow | <img src=x onerror=alert(1)>\n## Version 9: promoted [here](http://evil.example) `rm`"
    text = Verdict(promoted=False, reasons=(reason,), opponent="<b>it</b>", challenger="2").markdown()
    assert text.count("\n") == 3
    assert "<" not in text.replace("\\<", "")
    assert "](" not in text
    assert "\\|" in text
