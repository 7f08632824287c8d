"""The certificate tells equal outputs from different ones, and rounding from error."""

import copy
from dataclasses import replace

import pytest
import torch

from hass_core.config import SamplingConfig
from hass_core.decoding.answers import Generation, StopRule
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
from hass_core.draft_model.checkpoint import load_draft
from hass_core.evaluation.lossless import certify, first_difference, in_float32, last_logits
from hass_core.target_model.runner import make_runner

from .conftest import TREE

PROMPTS = [("a", list(range(3, 20))), ("b", list(range(40, 80)))]


class Altered:
    """Plain decoding that gets one token wrong."""

    name = "altered"

    def __init__(self, decoder, place):
        self._decoder, self._place = decoder, place

    def generate(self, prompts, *arguments, **options):
        (generation,) = self._decoder.generate(prompts, *arguments, **options)
        tokens = list(generation.token_ids)
        tokens[self._place] = (tokens[self._place] + 1) % 256
        return [Generation(tokens)]


def test_speculative_output_is_certified_token_by_token(tiny_target, draft_dir):
    runner = make_runner(tiny_target)
    drafted = SpeculativeDecoder(runner, load_draft(draft_dir, tiny_target), TREE)
    certificate = certify(tiny_target, tiny_target, PlainDecoder(runner), drafted, PROMPTS, 20)
    assert certificate.identical
    assert (certificate.dtype, certificate.questions, certificate.tokens) == ("float32", 2, 40)


def test_sampled_output_is_certified_too(tiny_target, draft_dir):
    runner = make_runner(tiny_target)
    drafted, plain = SpeculativeDecoder(runner, load_draft(draft_dir, tiny_target), TREE), PlainDecoder(runner)
    certificate = certify(tiny_target, tiny_target, plain, drafted, PROMPTS, 20, temperatures=(0.0, 1.0))
    assert certificate.identical
    assert (certificate.questions, certificate.tokens) == (2, 80)
    wrong = certify(tiny_target, tiny_target, plain, Altered(plain, 7), PROMPTS, 20, temperatures=(1.0,))
    assert not wrong.only_near_ties
    assert wrong.differences[0].position == 7


def test_one_wrong_token_is_found_with_its_place_and_logit_gap(tiny_target):
    plain = PlainDecoder(make_runner(tiny_target))
    certificate = certify(tiny_target, tiny_target, plain, Altered(plain, 7), PROMPTS, 20)
    assert not certificate.identical
    assert not certificate.only_near_ties
    difference = certificate.differences[0]
    assert (difference.question, difference.position, difference.rounding) == ("a", 7, 0)
    assert certificate.tokens == 14
    tokens = plain.generate([PROMPTS[0][1]], *_greedy(tiny_target))[0].token_ids
    logits = last_logits(make_runner(tiny_target), PROMPTS[0][1] + tokens[:7])
    assert difference.logit_gap == pytest.approx(float(logits[tokens[7]] - logits[(tokens[7] + 1) % 256]), rel=1e-5)


def test_a_wrong_token_in_half_precision_is_no_near_tie(tiny_target):
    half = replace(tiny_target, model=in_half(tiny_target.model))
    plain = PlainDecoder(make_runner(half))
    certificate = certify(half, in_float32(half), plain, Altered(plain, 3), PROMPTS[:1], 10)
    difference = certificate.differences[0]
    assert certificate.dtype == "bfloat16"
    assert 0 < difference.rounding < difference.logit_gap / 2
    assert not difference.near_tie


def test_the_float32_copy_leaves_the_target_as_it_is(tiny_target):
    half = replace(tiny_target, model=in_half(tiny_target.model))
    exact = in_float32(half)
    assert (half.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(exact.head, half.head.float())
    assert in_float32(exact) is exact


def test_the_first_difference_counts_an_early_end():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def in_half(model):
    return copy.deepcopy(model).bfloat16()


def _greedy(target):
    return SamplingConfig(), 20, StopRule.of(target)
