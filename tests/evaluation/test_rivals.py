"""Rivals are lossless too, and draft what they say they draft."""

import math
from collections import Counter

import pytest
import torch

from hass_core.config import SamplingConfig
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder
from hass_core.decoding.rivals.lookup import PromptLookupDecoder, lookup
from hass_core.decoding.rivals.speculative_sampling import SpeculativeSamplingDecoder, first_layers
from hass_core.errors import BadInput, ConfigError, ContextTooLong
from hass_core.target_model.runner import make_runner

PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], list(range(30, 70)), [9]]
GREEDY = SamplingConfig()


@pytest.fixture
def runner(tiny_target):
    return make_runner(tiny_target)


@pytest.fixture
def sps(runner, tiny_target):
    return SpeculativeSamplingDecoder(runner, make_runner(first_layers(tiny_target)))


@pytest.fixture
def stop(tiny_target):
    return StopRule.of(tiny_target)


def texts(decoder, stop, prompts=PROMPTS, sampling=GREEDY, tokens=25, seed=None):
    return [generation.token_ids for generation in decoder.generate(prompts, sampling, tokens, stop, seed)]


def test_greedy_lookup_decoding_gives_the_plain_answer(runner, stop):
    assert texts(PromptLookupDecoder(runner), stop) == texts(PlainDecoder(runner), stop)


def test_greedy_speculative_sampling_gives_the_plain_answer(runner, sps, stop):
    assert texts(sps, stop) == texts(PlainDecoder(runner), stop)


def test_a_perfect_small_model_is_always_accepted(runner, stop):
    itself = SpeculativeSamplingDecoder(runner, runner, draft_tokens=4)
    (generation,) = itself.generate(PROMPTS[:1], GREEDY, 26, stop)
    assert generation.token_ids == texts(PlainDecoder(runner), stop, PROMPTS[:1], tokens=26)[0]
    assert [cycle.accepted for cycle in generation.cycles] == [4] * 5


def test_sampling_from_a_perfect_small_model_accepts_everything_too(runner, stop):
    itself = SpeculativeSamplingDecoder(runner, runner, draft_tokens=3)
    (generation,) = itself.generate(PROMPTS[1:2], SamplingConfig(temperature=1.0), 20, stop, seed=4)
    assert all(cycle.accepted == 3 for cycle in generation.cycles)


def test_sampled_tokens_follow_the_targets_distribution(runner, sps, stop, tiny_target):
    """Answers of three tokens: chi-square of 1,000 of them against the exact distribution."""
    sampling = SamplingConfig(temperature=0.7, top_k=4)
    draws = [tuple(texts(sps, stop, [PROMPTS[0]], sampling, 3, seed)[0]) for seed in range(1000)]
    expected = exact_distribution(tiny_target, runner, sampling)
    assert set(draws) <= set(expected)
    frequent = {answer: p for answer, p in expected.items() if 1000 * p >= 5}
    counts = Counter(draws)
    statistic = sum((counts[answer] - 1000 * p) ** 2 / (1000 * p) for answer, p in frequent.items())
    degrees = len(frequent)
    assert degrees > 10
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


def exact_distribution(target, runner, sampling):
    """Probability of every answer of three tokens (or fewer, ended by an end token)."""
    from hass_core.evaluation.lossless import last_logits
    from hass_core.sampling import probabilities

    found = {}

    def extend(answer, probability):
        if len(answer) == 3 or (answer and answer[-1] in target.eos_token_ids):
            found[tuple(answer)] = probability
            return
        p = probabilities(last_logits(runner, PROMPTS[0] + answer), sampling)
        for token in p.nonzero()[:, 0].tolist():
            extend([*answer, token], probability * float(p[token]))

    extend([], 1.0)
    assert sum(found.values()) == pytest.approx(1, abs=1e-4)
    return found


def test_the_same_seed_gives_the_same_sampled_answer(sps, stop):
    hot = SamplingConfig(temperature=1.0)
    assert texts(sps, stop, sampling=hot, seed=1) == texts(sps, stop, sampling=hot, seed=1)
    assert texts(sps, stop, sampling=hot, seed=1) != texts(sps, stop, sampling=hot, seed=9)


def test_streamed_steps_join_to_the_generated_answer(runner, sps, stop):
    for decoder in (sps, PromptLookupDecoder(runner)):
        streamed = [token for step in decoder.stream(PROMPTS[1], GREEDY, 15, stop) for token in step.token_ids]
        assert streamed == texts(decoder, stop, PROMPTS[1:2], tokens=15)[0]


def test_first_layers_share_the_targets_weights(tiny_target):
    small = first_layers(tiny_target)
    assert small.model.config.num_hidden_layers == 1
    assert tiny_target.model.config.num_hidden_layers == 2
    assert small.head.data_ptr() == tiny_target.head.data_ptr()
    assert len(tiny_target.model.model.layers) == 2


def test_lookup_takes_the_longest_match_and_the_latest_of_them():
    assert lookup([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 2) == [9, 2]
    assert lookup([2, 3, 8, 2, 3, 7, 5, 2, 3], 2) == [7, 5]
    assert lookup([1, 2, 3], 4) == []
    assert lookup([4, 4, 4, 4], 4) == [4]


def test_lookup_saves_passes_where_an_answer_repeats_itself(runner, stop):
    """A penalty below 1 makes the target repeat what it said: from then on lookup is right."""
    repeating = SamplingConfig(repetition_penalty=0.2)
    (generation,) = PromptLookupDecoder(runner).generate([PROMPTS[0]], repeating, 60, stop)
    assert generation.token_ids == texts(PlainDecoder(runner), stop, PROMPTS[:1], repeating, 60)[0]
    assert len(generation.cycles) < 30


def test_speculative_sampling_refuses_what_it_cannot_do(sps, stop, runner):
    with pytest.raises(ConfigError, match="takes no repetition_penalty"):
        texts(sps, stop, sampling=SamplingConfig(repetition_penalty=1.3))
    with pytest.raises(ContextTooLong, match="600 tokens"):
        texts(sps, stop, prompts=[[5] * 600])
    with pytest.raises(BadInput, match="no tokens"):
        texts(sps, stop, prompts=[[]])


def test_an_answer_may_fill_the_context_to_its_end(runner, sps, stop):
    prompt = torch.randint(3, 250, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    for decoder in (sps, PromptLookupDecoder(runner)):
        assert texts(decoder, stop, [prompt], tokens=50) == texts(PlainDecoder(runner), stop, [prompt], tokens=50)
