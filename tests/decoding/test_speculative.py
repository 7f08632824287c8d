"""Speculative decoding gives exactly what plain decoding gives, whatever the draft, the tree, the family, the batch."""

import pytest
import torch

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
from hass_core.decoding.draft_runner import DraftRunner
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.family import Family
from hass_core.errors import ContextTooLong, DraftMismatch, NonFinite
from hass_core.target_model.generic import HFRunner
from hass_core.target_model.loader import freeze
from hass_core.target_model.runner import make_runner
from tests.conftest import byte_tokenizer, tiny_llama
from tests.decoding.conftest import ENDLESS, OracleDrafter, random_draft, worst_draft
from tests.target_model.conftest import VARIANTS, tiny_model

GREEDY = SamplingConfig()
WARM = SamplingConfig(temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.2, seed=3)
TREES = {
    "dynamic": TreeConfig(kind="dynamic", depth=4, top_k=3, nodes=14),
    "static": TreeConfig(kind="static", depth=3, top_k=4, nodes=11),
    "chain": TreeConfig(kind="chain", depth=5),
    "eight bits": TreeConfig(kind="dynamic", depth=3, top_k=3, nodes=9, eight_bits=True),
    "fewer nodes than levels": TreeConfig(kind="dynamic", depth=6, top_k=2, nodes=4),
}


def oracle_decoder(target, tree, prompts, answers, luck=0.8, family: Family = "target") -> SpeculativeDecoder:
    draft = random_draft(target, family=family)
    decoder = SpeculativeDecoder(make_runner(target), draft, tree)
    decoder._drafter = OracleDrafter(draft, decoder.shape, prompts, answers, luck)
    return decoder


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_plain_greedy_for_every_family_tree_and_batch(variant, tree, batch, prompts):
    target, prompts = tiny_model(variant), prompts[:batch]
    runner = make_runner(target)
    expected = [g.token_ids for g in PlainDecoder(runner).generate(prompts, GREEDY, 40, ENDLESS)]
    for draft in (random_draft(target), worst_draft(target)):
        decoder = SpeculativeDecoder(runner, draft, TREES[tree])
        assert [g.token_ids for g in decoder.generate(prompts, GREEDY, 40, ENDLESS)] == expected
    lucky = oracle_decoder(target, TREES[tree], prompts, expected).generate(prompts, GREEDY, 40, ENDLESS)
    assert [g.token_ids for g in lucky] == expected
    assert max(c.accepted for g in lucky for c in g.cycles) >= 2  # the comparison did exercise acceptance


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tree", TREES)
def test_sampled_tokens_equal_plain_sampling_with_the_same_seed(tiny_target, tree, batch, prompts):
    prompts, runner = prompts[:batch], make_runner(tiny_target)
    expected = [g.token_ids for g in PlainDecoder(runner).generate(prompts, WARM, 40, ENDLESS, seed=11)]
    decoder = SpeculativeDecoder(runner, random_draft(tiny_target), TREES[tree])
    assert [g.token_ids for g in decoder.generate(prompts, WARM, 40, ENDLESS, seed=11)] == expected
    lucky = oracle_decoder(tiny_target, TREES[tree], prompts, expected).generate(prompts, WARM, 40, ENDLESS, seed=11)
    assert [g.token_ids for g in lucky] == expected
    other = decoder.generate(prompts, WARM, 40, ENDLESS, seed=12)
    assert [g.token_ids for g in other] != expected


def test_a_row_of_a_batch_gets_what_it_gets_alone(tiny_target, prompts):
    decoder = SpeculativeDecoder(make_runner(tiny_target), random_draft(tiny_target), TREES["dynamic"])
    together = decoder.generate(prompts, GREEDY, 30, ENDLESS)
    for prompt, generation in zip(prompts, together, strict=True):
        assert decoder.generate([prompt], GREEDY, 30, ENDLESS)[0].token_ids == generation.token_ids


def test_a_perfect_draft_is_accepted_to_its_full_depth_every_cycle(prompts):
    # without attention and MLP the next token depends on the last alone, and a draft can know it all
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    target = freeze(model, byte_tokenizer(), name="bigram")
    draft = random_draft(target)
    hidden = target.head.shape[1]
    draft.model.fc.weight.copy_(torch.cat([100 * torch.eye(hidden), torch.zeros(hidden, hidden)], 1))
    draft.model.layer.self_attn.o_proj.weight.zero_()
    draft.model.layer.mlp.down_proj.weight.zero_()
    for tree in TREES.values():
        decoder = SpeculativeDecoder(make_runner(target), draft, tree)
        deepest = decoder.shape.longest_path - 1
        (generation,) = decoder.generate(prompts[:1], GREEDY, 1 + 4 * (deepest + 1), ENDLESS)
        assert [c.accepted for c in generation.cycles] == [deepest] * 4
        assert all(set(c.ranks) == {0} for c in generation.cycles)


def test_any_causal_model_decodes_through_the_generic_runner(prompts):
    target = tiny_model("gpt_neox")  # rotates a part of each head: its draft is of the family that every engine builds
    runner = make_runner(target)
    assert isinstance(runner, HFRunner)
    expected = PlainDecoder(runner).generate(prompts, GREEDY, 25, ENDLESS)
    answers = [g.token_ids for g in expected]
    decoder = oracle_decoder(target, TREES["dynamic"], prompts, answers, family="llama")
    lucky = decoder.generate(prompts, GREEDY, 25, ENDLESS)
    assert [g.token_ids for g in lucky] == answers


def test_a_trimmed_draft_vocabulary_changes_acceptance_only(tiny_target, prompts):
    runner = make_runner(tiny_target)
    expected = PlainDecoder(runner).generate(prompts, GREEDY, 30, ENDLESS)
    draft = random_draft(tiny_target, token_ids=torch.arange(40, 80))
    generations = SpeculativeDecoder(runner, draft, TREES["dynamic"]).generate(prompts, GREEDY, 30, ENDLESS)
    assert [g.token_ids for g in generations] == [g.token_ids for g in expected]


def test_end_tokens_cut_inside_an_accepted_run(tiny_target, prompts):
    runner, prompt = make_runner(tiny_target), prompts[:1]
    (endless,) = PlainDecoder(runner).generate(prompt, GREEDY, 30, ENDLESS)
    for position in range(1, 12):
        eos = endless.token_ids[position]
        cut = endless.token_ids[: endless.token_ids.index(eos) + 1]
        rule = StopRule(frozenset({eos, 1_000_000}))
        decoder = oracle_decoder(tiny_target, TREES["chain"], prompt, [endless.token_ids], luck=1.0)
        (generation,) = decoder.generate(prompt, GREEDY, 30, rule)
        assert (generation.token_ids, generation.finished) == (cut, "eos")


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_token_limit_cuts_inside_an_accepted_run(tiny_target, prompts, limit):
    runner, prompt = make_runner(tiny_target), prompts[:1]
    (endless,) = PlainDecoder(runner).generate(prompt, GREEDY, 30, ENDLESS)
    decoder = oracle_decoder(tiny_target, TREES["chain"], prompt, [endless.token_ids], luck=1.0)
    (generation,) = decoder.generate(prompt, GREEDY, limit, ENDLESS)
    assert (generation.token_ids, generation.finished) == (endless.token_ids[:limit], "length")


def test_stop_strings_cut_at_the_token_that_completes_them(tiny_target, prompts):
    runner, prompt = make_runner(tiny_target), prompts[:1]
    (endless,) = PlainDecoder(runner).generate(prompt, GREEDY, 30, ENDLESS)
    string = tiny_target.tokenizer.decode(endless.token_ids[3:6])
    rule = StopRule.of(tiny_target, [string], ignore_eos=True)
    (generation,) = SpeculativeDecoder(runner, random_draft(tiny_target), TREES["dynamic"]).generate(
        prompt, GREEDY, 30, rule
    )
    assert generation.finished == "stop"
    assert string in tiny_target.tokenizer.decode(generation.token_ids)
    assert string not in tiny_target.tokenizer.decode(generation.token_ids[:-1])
    assert generation.token_ids == endless.token_ids[: len(generation.token_ids)]


def test_the_stream_gives_the_same_tokens_step_by_step_and_two_streams_do_not_disturb_each_other(tiny_target, prompts):
    decoder = SpeculativeDecoder(make_runner(tiny_target), random_draft(tiny_target), TREES["dynamic"])
    expected = [g.token_ids for g in decoder.generate(prompts[:2], GREEDY, 20, ENDLESS)]
    streams = [decoder.stream(prompt, GREEDY, 20, ENDLESS) for prompt in prompts[:2]]
    seen: list[list[int]] = [[], []]
    open_streams = [0, 1]
    while open_streams:
        for i in list(open_streams):
            step = next(streams[i], None)
            if step is None:
                open_streams.remove(i)
            else:
                seen[i] += step.token_ids
    assert seen == expected


def test_the_answer_may_fill_the_context_to_its_last_token(prompts):
    target = freeze(tiny_llama(max_position_embeddings=32), byte_tokenizer(), name="short")
    runner = make_runner(target)
    (expected,) = PlainDecoder(runner).generate(prompts[1:2], GREEDY, 100, ENDLESS)
    assert len(prompts[1]) + len(expected.token_ids) == 32
    (generation,) = SpeculativeDecoder(runner, random_draft(target), TREES["dynamic"]).generate(
        prompts[1:2], GREEDY, 100, ENDLESS
    )
    assert (generation.token_ids, generation.finished) == (expected.token_ids, "length")


def test_positions_that_depend_on_the_length_are_looked_up_level_by_level(prompts):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    target = freeze(tiny_llama(rope_scaling=scaling), byte_tokenizer(), name="stretched")
    runner, draft = make_runner(target), random_draft(target)
    asked = []
    drafting = DraftRunner(draft.model)
    drafter = Drafter(draft, TreeShape.of(TREES["dynamic"], draft.head.size), drafting)
    look_up = drafting.rope.at
    drafting.rope.at = lambda positions: asked.append(positions) or look_up(positions)
    cache = drafter.new_cache(1, 64)
    sampler = Sampler(SamplingConfig(), 1, runner.vocab_size, runner.device)
    drafter.grow(cache, torch.tensor([5]), torch.randn(1, runner.hidden_size), sampler)
    assert [positions.unique().tolist() for positions in asked] == [[0], [1], [2]]
    expected = PlainDecoder(runner).generate(prompts, GREEDY, 20, ENDLESS)
    got = SpeculativeDecoder(runner, draft, TREES["dynamic"]).generate(prompts, GREEDY, 20, ENDLESS)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(tiny_target):
    decoder = SpeculativeDecoder(make_runner(tiny_target), random_draft(tiny_target), TREES["chain"])
    with pytest.raises(ContextTooLong, match=r"prompt 1 has 512 tokens, the target's context holds 512"):
        decoder.generate([[3], [3] * 512], GREEDY, 4, ENDLESS)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.0)])
def test_broken_logits_are_reported_with_prompt_and_position(prompts, sampling):
    target = freeze(tiny_llama(), byte_tokenizer(), name="broken")
    decoder = SpeculativeDecoder(make_runner(target), random_draft(target), TREES["dynamic"])
    target.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFinite, match=r"logits for prompt 0 are NaN or infinite after 0 new tokens"):
        decoder.generate(prompts, sampling, 4, ENDLESS)


def test_a_draft_for_another_size_is_refused_naming_both(tiny_target):
    other = freeze(tiny_llama(hidden_size=32), byte_tokenizer(), name="other")
    with pytest.raises(DraftMismatch, match="the draft has hidden_size 32, the target has 48"):
        SpeculativeDecoder(make_runner(tiny_target), random_draft(other), TREES["chain"])
