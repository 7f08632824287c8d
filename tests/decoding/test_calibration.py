"""Sharpness and width are found again from races that were run with them."""

import pytest
import torch

from hass_core.decoding.calibration import USUAL, at_temperature, calibration_of, fit


def test_the_fit_finds_the_weights_that_made_the_winners():
    generator = torch.Generator().manual_seed(0)
    log_q = [torch.randn(12, generator=generator).mul(2).log_softmax(0) for _ in range(3000)]
    noise = [-torch.empty(12).exponential_(generator=generator).log() for _ in log_q]
    chances = [((1.5 * q + g) / 2).softmax(0) for q, g in zip(log_q, noise, strict=True)]
    winners = [int(torch.multinomial(chance, 1, generator=generator)) for chance in chances]
    assert fit(log_q, noise, winners) == pytest.approx((1.5, 2.0), rel=0.15)


def test_a_draft_tells_its_own_and_temperatures_between_are_interpolated():
    own = calibration_of({"calibration": {"0.5": [1.0, 2.0], "1": [2.0, 1.0]}})
    assert at_temperature(own, 0.75) == (1.5, 1.5)
    assert at_temperature(own, 0.1) == (1.0, 2.0)
    assert at_temperature(own, 3.0) == (2.0, 1.0)
    assert calibration_of({}) == USUAL
