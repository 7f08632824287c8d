"""Traffic that changed is told from traffic that varies."""

import random

from hass_core.data.holdout import TRAINING_FILE, packaged_prompts
from hass_core.evaluation.drift import traffic_drift

TEXTS = [record.messages[0]["content"] for record in packaged_prompts(TRAINING_FILE)]
OTHERS = [f"SELECT name, total FROM orders WHERE customer = {n} ORDER BY total DESC LIMIT {n % 7};" for n in range(300)]


def dealt(seed: int) -> tuple[list[str], list[str]]:
    texts = random.Random(seed).sample(TEXTS, len(TEXTS))
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def test_two_halves_of_the_same_traffic_have_not_drifted():
    found = [traffic_drift(*dealt(seed)) for seed in range(5)]
    assert all(one.distance < 1.1 * one.by_chance for one in found)


def test_a_quarter_of_other_questions_is_a_drift_and_more_is_a_larger_one():
    trained, recent = dealt(0)
    some = traffic_drift(trained, recent[: len(recent) * 3 // 4] + OTHERS[: len(recent) // 4])
    all_of_it = traffic_drift(trained, OTHERS)
    assert some.distance > 1.5 * some.by_chance
    assert all_of_it.distance > 3 * some.distance
    assert all_of_it.distance < 1


def test_another_script_and_broken_letters_can_be_compared():
    found = traffic_drift(["Was ist Regen?", "为什么天是蓝的？"] * 20, ["\ud800 odd", "なぜ空は青い？"] * 20)
    assert found.distance > found.by_chance
    assert found.conversations == 40
