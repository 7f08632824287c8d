"""Cycles repeated from the record are the cycles of real decoding, and so is the tau they give."""

import pytest
import torch

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.decoder import SpeculativeDecoder
from hass_core.decoding.drafter import Drafter
from hass_core.decoding.replay import Recording, last_answer, noise_given, replay, tree_tau
from hass_core.decoding.tree import TreeShape
from hass_core.target_model.capture import capture_features
from hass_core.target_model.runner import make_runner
from tests.decoding.conftest import ENDLESS, random_draft

TREES = {
    "dynamic": TreeConfig(kind="dynamic", depth=4, top_k=3, nodes=14),
    "static": TreeConfig(kind="static", depth=3, top_k=4, nodes=11),
    "chain": TreeConfig(kind="chain", depth=5),
}


def record(target, prompt: list[int], answer: list[int]) -> Recording:
    ids = prompt + answer
    features = capture_features(target, [ids])[0].to(target.dtype)
    return Recording(torch.tensor(ids), features, len(prompt))


def helpful_draft(target):
    """A random draft whose estimate is mostly the feature it was given: it guesses right now and then."""
    draft = random_draft(target)
    hidden = target.head.shape[1]
    draft.model.fc.weight[:, hidden:] += torch.eye(hidden)
    return draft


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replayed_cycles_are_those_of_decoding(tiny_target, prompts, tree, temperature):
    runner, draft = make_runner(tiny_target), helpful_draft(tiny_target)
    decoder = SpeculativeDecoder(runner, draft, TREES[tree])
    generations = decoder.generate(prompts, SamplingConfig(temperature=temperature), 60, ENDLESS, seed=4)
    answers = [record(tiny_target, p, g.token_ids) for p, g in zip(prompts, generations, strict=True)]
    sampling = SamplingConfig(temperature=temperature)
    replayed = replay(Drafter(draft, TreeShape.of(TREES[tree], draft.head.size)), answers, tiny_target.head, sampling)
    decoded = [[cycle.accepted for cycle in g.cycles] for g in generations]
    # stored features are bfloat16, decoding's float32: a near-tie among the drafts may fall the other way
    # the noise of a sampled answer is drawn again, given the tokens: the counts are as likely, not the same
    exact = 0.03 if temperature == 0 else 0.15
    assert tree_tau([c[:-1] for c in replayed]) == pytest.approx(tree_tau([c[:-1] for c in decoded]), rel=exact)
    assert any(accepted for cycles in replayed for accepted in cycles)


def test_with_exact_features_every_cycle_is_the_same(tiny_target, prompts):
    runner, draft = make_runner(tiny_target), helpful_draft(tiny_target)
    tree = TREES["dynamic"]
    generations = SpeculativeDecoder(runner, draft, tree).generate(prompts, SamplingConfig(), 60, ENDLESS)
    answers = []
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = torch.tensor([prompt + generation.token_ids])
        exact = tiny_target.model.model(input_ids=ids).last_hidden_state[0].detach()
        answers.append(Recording(ids[0], exact, len(prompt)))
    replayed = replay(Drafter(draft, TreeShape.of(tree, draft.head.size)), answers, tiny_target.head)
    decoded = [[cycle.accepted for cycle in g.cycles] for g in generations]
    assert [cycles[:-1] for cycles in replayed] == [cycles[:-1] for cycles in decoded]  # the limit cuts the last


def test_a_draft_set_to_the_end_of_a_prompt_decodes_as_if_it_began_there(tiny_target, prompts):
    prompts = prompts[:3]
    runner, draft, last = make_runner(tiny_target), helpful_draft(tiny_target), min(map(len, prompts)) - 2
    assert len(set(map(len, prompts))) > 1
    tree = TREES["dynamic"].model_copy(update={"prompt_tokens": last})
    generations = SpeculativeDecoder(runner, draft, tree).generate(prompts, SamplingConfig(), 60, ENDLESS)
    answers = []
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = torch.tensor([prompt + generation.token_ids])
        exact = tiny_target.model.model(input_ids=ids).last_hidden_state[0].detach()
        answers.append(Recording(ids[0, len(prompt) - last :], exact[len(prompt) - last :], last))
    replayed = replay(Drafter(draft, TreeShape.of(tree, draft.head.size)), answers, tiny_target.head)
    decoded = [[cycle.accepted for cycle in g.cycles] for g in generations]
    assert [cycles[:-1] for cycles in replayed] == [cycles[:-1] for cycles in decoded]
    whole = SpeculativeDecoder(runner, draft, TREES["dynamic"]).generate(prompts, SamplingConfig(), 60, ENDLESS)
    assert [g.token_ids for g in whole] == [g.token_ids for g in generations]
    assert [[cycle.accepted for cycle in g.cycles] for g in whole] != decoded


def test_the_last_answer_is_found_with_its_context():
    ids, features = torch.arange(9), torch.zeros(9, 4)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0])
    answer = last_answer(ids, mask, features)
    assert answer is not None
    assert (answer.token_ids.tolist(), answer.start, len(answer.features)) == ([0, 1, 2, 3, 4, 5, 6, 7], 5, 8)
    assert last_answer(ids, torch.zeros(9), features) is None
    assert last_answer(ids, torch.tensor([0, 1, 1, 0, 0, 0, 0, 0, 0]), features) is None  # root and one token


def test_tau_counts_the_token_every_cycle_adds():
    assert tree_tau([[2, 0], [1]]) == 2.0
    assert tree_tau([]) == 1.0


def test_noise_given_a_winner_lets_it_win_and_is_gumbel_noise_over_all_winners():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).double()
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        winner = int(torch.multinomial(p, 1, generator=generator))
        fresh = -torch.empty(5, dtype=torch.float64).exponential_(generator=generator).log()
        noise = noise_given(winner, p, fresh)
        assert int((p.log() + noise).argmax()) == winner
        found.append(noise)
    arrivals = (-torch.stack(found)).exp()
    assert arrivals.mean(0)[:4].tolist() == pytest.approx([1.0] * 4, abs=0.08)
    assert arrivals.var(0)[:4].tolist() == pytest.approx([1.0] * 4, abs=0.2)
    assert torch.corrcoef(arrivals.T).fill_diagonal_(0).abs().max() < 0.06
