"""The processors against transformers' own."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hass_core.config import SamplingConfig
from hass_core.sampling import probabilities

CASES = [
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.0, top_k=5),
    SamplingConfig(temperature=1.0, top_p=0.8),
    SamplingConfig(temperature=1.0, min_p=0.1),
    SamplingConfig(temperature=1.0, repetition_penalty=1.5),
    SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=0.8),
]


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_probabilities_equal_those_of_transformers(sampling):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 50, generator=generator)
    before = torch.randint(0, 50, (8, 12), generator=generator)
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    expected = chain(before, logits.clone()).softmax(-1)
    seen = torch.zeros(8, 50, dtype=torch.bool).scatter_(1, before, True)
    torch.testing.assert_close(probabilities(logits, sampling, seen), expected, atol=1e-6, rtol=1e-5)


def test_temperature_zero_is_a_point_on_the_likeliest_token():
    p = probabilities(torch.tensor([[0.0, 2.0, 1.0]]), SamplingConfig())
    assert p.tolist() == [[0.0, 1.0, 0.0]]
