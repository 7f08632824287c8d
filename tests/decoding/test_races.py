"""A calibration is fitted to a draft by the target's own draws at positions of answers."""

from dataclasses import replace

import pytest
import torch

from hass_core.config import SamplingConfig
from hass_core.decoding.decoder import PlainDecoder
from hass_core.decoding.drafter import at_temperature, calibration_of
from hass_core.decoding.races import TEMPERATURES, among, fitted_calibration
from hass_core.decoding.replay import Recording
from hass_core.target_model.capture import capture_features
from hass_core.target_model.runner import make_runner
from tests.decoding.conftest import ENDLESS, random_draft, worst_draft


@pytest.fixture(scope="module")
def answers(tiny_target):
    runner, prompts = make_runner(tiny_target), [[5, 6, 7], [8, 9]]
    found = PlainDecoder(runner).generate(prompts, SamplingConfig(temperature=1.0), 80, ENDLESS, seed=1)
    rows = [(prompt, prompt + answer.token_ids) for prompt, answer in zip(prompts, found, strict=True)]
    features = capture_features(tiny_target, [ids for _, ids in rows])
    return [
        Recording(torch.tensor(ids), f.to(tiny_target.dtype), len(prompt))
        for (prompt, ids), f in zip(rows, features, strict=True)
    ]


def copying_draft(target):
    """Takes the feature it is given for the next one's: knows something, not much."""
    draft = random_draft(target)
    draft.model.fc.weight[:, target.head.shape[1] :] += torch.eye(target.head.shape[1])
    return draft


def test_a_draft_that_knows_nothing_gets_less_weight_than_one_that_does(tiny_target, answers):
    good = fitted_calibration(copying_draft(tiny_target), answers, tiny_target.head)
    bad = fitted_calibration(worst_draft(tiny_target), answers, tiny_target.head)
    assert list(good) == list(bad) == [str(t) for t in TEMPERATURES]
    assert all(good[t][0] > bad[t][0] for t in good)
    told = calibration_of({"calibration": good})
    assert at_temperature(told, 0.8) == good["0.8"]


def test_a_trimmed_draft_races_with_its_own_tokens(tiny_target, answers):
    kept = torch.arange(0, tiny_target.head.shape[0], 2)
    draft = random_draft(tiny_target, token_ids=kept)
    assert fitted_calibration(draft, answers, tiny_target.head).keys() <= {str(t) for t in TEMPERATURES}
    inside, index = among(torch.tensor([4, 5, 0]), kept, tiny_target.head.shape[0])
    assert (inside.tolist(), index.tolist()) == ([True, False, True], [2, 0, 0])


def test_too_few_positions_give_no_calibration(tiny_target, answers):
    short = [replace(a, token_ids=a.token_ids[: a.start + 9], features=a.features[: a.start + 9]) for a in answers]
    assert fitted_calibration(random_draft(tiny_target), short, tiny_target.head) == {}
