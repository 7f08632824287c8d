"""Candidates that share the target's noise: the same text as plain decoding's, in fewer cycles."""

import pytest
import torch

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder, TreeDecoder
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.tree import TreeShape
from hass_core.target_model.runner import make_runner
from tests.decoding.conftest import ENDLESS, random_draft

TREES = {"tree": TreeConfig(depth=3, top_k=4, nodes=12), "chain": TreeConfig(kind="chain", depth=3)}
SETTINGS = {
    "as it is": SamplingConfig(temperature=1.0),
    "cold": SamplingConfig(temperature=0.3),
    "top-k": SamplingConfig(temperature=1.3, top_k=7),
    "top-p": SamplingConfig(temperature=1.0, top_p=0.8),
    "min-p": SamplingConfig(temperature=1.0, min_p=0.1),
    "penalty": SamplingConfig(temperature=1.0, repetition_penalty=1.7),
}


class Likeliest(Drafter):
    """Does not look at the noise."""

    def grow(self, cache, root, estimate, sampler, fixed=None):
        return super().grow(cache, root, estimate, Sampler(SamplingConfig(), 1, 1, torch.device("cpu")), fixed)


def helpful_draft(target):
    """Its estimate is mostly the feature it was given: it guesses right now and then."""
    draft = random_draft(target)
    draft.model.fc.weight[:, target.head.shape[1] :] += torch.eye(target.head.shape[1])
    return draft


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_text_is_plain_samplings_with_that_seed(tiny_target, prompts, tree, name):
    runner, sampling = make_runner(tiny_target), SETTINGS[name]
    plain, drafted = PlainDecoder(runner), SpeculativeDecoder(runner, helpful_draft(tiny_target), TREES[tree])
    for seed in (1, 2):  # the second call finds the memory of the first
        expected, found = (d.generate(prompts, sampling, 90, ENDLESS, seed) for d in (plain, drafted))
        assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    assert sum(cycle.accepted for g in found for cycle in g.cycles) > 0


def test_sharing_the_noise_saves_cycles(tiny_target, prompts):
    runner, draft, sampling = make_runner(tiny_target), helpful_draft(tiny_target), SamplingConfig(temperature=1.0)
    shape = TreeShape.of(TREES["tree"], draft.head.size)
    coupled, likeliest = (
        sum(
            len(g.cycles)
            for g in TreeDecoder(runner, kind(draft, shape), "x").generate(prompts, sampling, 120, ENDLESS)
        )
        for kind in (Drafter, Likeliest)
    )
    assert coupled < 0.9 * likeliest


def test_a_trimmed_draft_vocabulary_shares_the_noise_of_the_targets_tokens(tiny_target, prompts):
    runner, sampling = make_runner(tiny_target), SamplingConfig(temperature=1.0)
    kept = torch.arange(0, tiny_target.head.shape[0], 2)
    trimmed = random_draft(tiny_target, token_ids=kept)
    trimmed.model.fc.weight[:, tiny_target.head.shape[1] :] += torch.eye(tiny_target.head.shape[1])
    shape = TreeShape.of(TREES["tree"], trimmed.head.size)
    coupled, likeliest = (
        TreeDecoder(runner, kind(trimmed, shape), "x").generate(prompts, sampling, 120, ENDLESS)
        for kind in (Drafter, Likeliest)
    )
    assert [g.token_ids for g in coupled] == [g.token_ids for g in likeliest]
    assert sum(len(g.cycles) for g in coupled) < sum(len(g.cycles) for g in likeliest)


def test_rows_of_a_batch_do_not_share_noise(tiny_target, prompts):
    runner = make_runner(tiny_target)
    answers = PlainDecoder(runner).generate([prompts[0]] * 4, SamplingConfig(temperature=1.0), 30, ENDLESS, seed=0)
    assert len({tuple(g.token_ids) for g in answers}) == 4
