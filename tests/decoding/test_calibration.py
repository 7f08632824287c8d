"""Sharpness and width are found again from races that were run with them."""

import pytest
import torch

from hass_core.decoding.drafter import USUAL, at_temperature, calibration_of
from hass_core.decoding.races import fit


def test_the_fit_finds_the_weights_that_made_the_winners():
    generator = torch.Generator().manual_seed(0)
    log_q = torch.randn(3000, 12, generator=generator).mul(2).log_softmax(1)
    noise = -torch.empty(3000, 12).exponential_(generator=generator).log()
    winners = torch.multinomial(((1.5 * log_q + noise) / 2).softmax(1), 1, generator=generator)[:, 0]
    assert fit(log_q, noise, winners) == pytest.approx((1.5, 2.0), rel=0.15)


def test_a_draft_tells_its_own_and_temperatures_between_are_interpolated():
    own = calibration_of({"calibration": {"0.5": [1.0, 2.0], "1": [2.0, 1.0]}})
    assert at_temperature(own, 0.75) == (1.5, 1.5)
    assert at_temperature(own, 0.1) == (1.0, 2.0)
    assert at_temperature(own, 3.0) == (2.0, 1.0)
    assert calibration_of({}) == USUAL
