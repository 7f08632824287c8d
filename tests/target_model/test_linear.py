"""Linear layers of a frozen model, in 16 and in 8 bits."""

import torch
import torch.nn.functional as F

from hass_core.target_model.block import Linear, in_eight_bits, restored


def test_eight_bits_keep_every_output_within_the_rounding_of_fp8():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 64) * torch.logspace(-4, 4, 40)[:, None], torch.randn(40), torch.randn(7, 64)
    weight[3] = 0
    rounded, scale = in_eight_bits(weight)
    error = (restored(rounded, scale, torch.float32) - weight).abs()
    # three bits behind the point, or the smallest step that a scale leaves
    assert (error <= torch.maximum(weight.abs() / 16, scale[:, None] * 2**-10)).all()
    exact, near = Linear(weight, bias)(x), Linear(weight, bias, eight_bits=True)(x)
    torch.testing.assert_close(exact, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, F.linear(x, restored(rounded, scale, torch.float32), bias), rtol=1e-4, atol=1e-4)
