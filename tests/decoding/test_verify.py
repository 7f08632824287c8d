"""Verification is lossless: by exact enumeration of its outcomes, against the sequential rule, and on samples."""

import itertools

import pytest
import torch

from hass_core.config import SamplingConfig, TreeConfig
from hass_core.decoding.decoder import SpeculativeDecoder
from hass_core.decoding.rivals.recursive_rejection import RecursiveRejectionDecoder
from hass_core.decoding.sampler import Noise, Sampler
from hass_core.decoding.tree import Pool, Tree, TreeShape, accept, ancestors, assemble
from hass_core.sampling import probabilities
from hass_core.target_model.loader import freeze
from hass_core.target_model.runner import make_runner
from tests.conftest import byte_tokenizer, tiny_llama
from tests.decoding.conftest import ENDLESS, random_draft

V = 3
# root ─ 0 ─ 2, root ─ 1: two levels, siblings and an only child; token 2 is never offered at the root
PARENTS, TOKENS = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[1, 0, 1, 2]])
TREE = Tree(TOKENS, PARENTS, torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 0, 1, 0]]), ancestors(PARENTS, 2), PARENTS)
SETTINGS = {
    "as it is": SamplingConfig(temperature=1.0),
    "cold": SamplingConfig(temperature=0.4),
    "top-k": SamplingConfig(temperature=1.3, top_k=2),
    "top-p": SamplingConfig(temperature=1.0, top_p=0.6),
    "min-p": SamplingConfig(temperature=1.0, min_p=0.5),
    "greedy": SamplingConfig(),
}


def outcomes(distribution: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Probability of every emitted run, summed over the tokens drawn at all nodes: distribution [N, V]."""
    found: dict[tuple[int, ...], float] = {}
    for drawn in itertools.product(range(V), repeat=4):
        probability = 1.0
        for node, token in enumerate(drawn):
            probability *= float(distribution[node, token])
        result = accept(TREE, torch.tensor([drawn]), longest_path=3)
        run = tuple(result.token_ids[0, : int(result.counts[0])].tolist())
        found[run] = found.get(run, 0.0) + probability
    return found


def after(run: tuple[int, ...]) -> int | None:
    """The node at which a sequence of tokens stands, None once it has left the tree."""
    node = 0
    for token in run:
        children = [n for n in range(1, 4) if int(PARENTS[0, n]) == node and int(TOKENS[0, n]) == token]
        if not children:
            return None
        node = children[0]
    return node


@pytest.mark.parametrize("name", SETTINGS)
def test_every_emitted_token_has_the_targets_distribution_at_its_exact_prefix(name):
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = probabilities(logits, SETTINGS[name]).double()
    emitted = outcomes(p)
    assert sum(emitted.values()) == pytest.approx(1, abs=1e-6)
    # P(run starts with prefix + token) must be P(run reaches prefix) · p(token | prefix)
    for prefix in [(), *{run[:i] for run in emitted for i in range(1, len(run))}]:
        node = after(prefix)
        assert node is not None
        reached = sum(q for run, q in emitted.items() if run[: len(prefix)] == prefix and len(run) > len(prefix))
        if reached == 0:
            continue
        following = [
            sum(q for run, q in emitted.items() if run[: len(prefix) + 1] == (*prefix, token)) / reached
            for token in range(V)
        ]
        assert 0.5 * sum(abs(a - float(b)) for a, b in zip(following, p[node], strict=True)) <= 1e-6


@pytest.mark.parametrize("name", SETTINGS)
def test_it_accepts_and_resamples_as_the_sequential_rule_does(name):
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = probabilities(logits, SETTINGS[name]).double()

    def sequential(node: int, run: tuple[int, ...], weight: float, found: dict[tuple[int, ...], float]) -> None:
        rest, left = p[node].clone(), weight
        for child in [n for n in range(1, 4) if int(PARENTS[0, n]) == node]:
            token = int(TOKENS[0, child])
            sequential(child, (*run, token), left * float(rest[token]), found)
            left *= 1 - float(rest[token])
            rest[token] = 0
            rest = rest / rest.sum() if float(rest.sum()) > 0 else rest
        for token in range(V):
            found[(*run, token)] = found.get((*run, token), 0.0) + left * float(rest[token])

    expected: dict[tuple[int, ...], float] = {}
    sequential(0, (), 1.0, expected)
    ours = outcomes(p)
    assert max(abs(ours.get(run, 0) - expected.get(run, 0)) for run in ours.keys() | expected.keys()) <= 1e-6


def test_a_draw_has_the_probability_of_the_processed_distribution():
    logits, count = torch.randn(7, generator=torch.Generator().manual_seed(3)), 20_000
    noise = Noise(1, 7, torch.device("cpu"))
    noise.start(seed=5)
    for sampling in SETTINGS.values():
        sampler = Sampler(sampling, 1, 7, torch.device("cpu"), noise)
        tokens, sound = sampler.draw(logits.expand(1, count, -1), torch.arange(count)[None])
        observed, expected = torch.bincount(tokens[0], minlength=7), count * probabilities(logits, sampling)
        assert bool(sound.all())
        assert int(observed[expected == 0].sum()) == 0
        statistic = float(((observed - expected) ** 2 / expected)[expected > 0].sum())
        freedom = int((expected > 0).sum()) - 1
        assert statistic <= freedom + 5 * (2 * freedom) ** 0.5


def test_a_token_that_is_excluded_never_wins_and_logits_that_are_no_numbers_show():
    sampler = Sampler(SamplingConfig(temperature=1.0), 1, 4, torch.device("cpu"))
    sampler.start(torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]), seed=0)
    never = float("-inf")
    tokens, _ = sampler.draw(torch.tensor([never, 1.0, 2.0, never]).expand(1, 500, -1), torch.arange(500)[None])
    assert set(tokens[0].tolist()) == {1, 2}
    _, sound = sampler.draw(
        torch.tensor([[[0.0, float("nan"), 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]]]), torch.zeros(1, 2).long()
    )
    assert sound.tolist() == [[False, True]]


def test_verification_follows_the_draws_in_every_row_by_itself():
    shape = TreeShape(depth=2, top_k=2, nodes=6, static=False)
    pool = Pool(
        torch.tensor([[5, 6, 7, 8, 9, 10]] * 3),
        torch.tensor([[-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]] * 3),
        torch.tensor([[-1, -1, 0, 0, 1, 1]] * 3),
    )
    tree = assemble(torch.tensor([4, 4, 4]), pool, shape)  # 5 ─ {7, 8}, 6 ─ {9}
    drawn = torch.tensor([[5, 8, 0, 0, 1, 0], [6, 9, 3, 0, 0, 0], [1, 7, 9, 0, 0, 0]])
    result = accept(tree, drawn, shape.longest_path)
    rows = [ids[:count] for ids, count in zip(result.token_ids.tolist(), result.counts.tolist(), strict=True)]
    assert rows == [[5, 8, 1], [6, 3], [1]]


THROUGH = {
    "tree, top-k": (TreeConfig(depth=2, top_k=3, nodes=8), SamplingConfig(temperature=0.8, top_k=4)),
    "tree, penalty": (
        TreeConfig(depth=2, top_k=3, nodes=8),
        SamplingConfig(temperature=0.7, top_k=5, repetition_penalty=1.6),
    ),
    "chain, top-p and min-p": (
        TreeConfig(kind="chain", depth=2),
        SamplingConfig(temperature=1.3, top_k=6, top_p=0.8, min_p=0.1),
    ),
    "recursive rejection": (TreeConfig(depth=2, top_k=3, nodes=8), SamplingConfig(temperature=0.8, top_k=4)),
}


@pytest.mark.parametrize("case", THROUGH)
def test_samples_through_the_whole_decoder_follow_the_targets_own_distribution(case):
    tree, sampling = THROUGH[case]
    target = freeze(tiny_llama(vocab_size=97, initializer_range=0.5), byte_tokenizer(), name="tiny")
    runner, prompt, answers = make_runner(target), [5, 17, 3, 9], 3000
    kind = RecursiveRejectionDecoder if case == "recursive rejection" else SpeculativeDecoder
    decoder = kind(runner, random_draft(target), tree)
    pairs: dict[tuple[int, int], int] = {}
    accepted = 0
    for start in range(0, answers, 500):
        for generation in decoder.generate([prompt] * 500, sampling, 3, ENDLESS, seed=start):
            second = (generation.token_ids[1], generation.token_ids[2])
            pairs[second] = pairs.get(second, 0) + 1
            accepted += generation.cycles[0].accepted
    assert accepted > 20  # both branches of the rule were taken
    expected = _second_and_third(target, prompt, sampling)
    assert pairs.keys() <= expected.keys()
    common = {pair: q for pair, q in expected.items() if q * answers >= 5}
    statistic = sum((pairs.get(pair, 0) - answers * q) ** 2 / (answers * q) for pair, q in common.items())
    freedom = len(common)
    # Wilson-Hilferty: the cube root of a chi-square is nearly normal
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert abs(deviation) < 4


def _second_and_third(target, prompt: list[int], sampling: SamplingConfig) -> dict[tuple[int, int], float]:
    """Exact probabilities of (second, third) answer tokens, by the model's own forward passes."""

    def following(token_ids: list[int]) -> list[tuple[int, float]]:
        with torch.no_grad():
            seen = torch.zeros(97, dtype=torch.bool).index_fill(0, torch.tensor(token_ids), True)
            p = probabilities(target.model(torch.tensor([token_ids])).logits[0, -1], sampling, seen)
        return [(token, float(p[token])) for token in p.nonzero()[:, 0].tolist()]

    found: dict[tuple[int, int], float] = {}
    for first, p_first in following(prompt):
        for second, p_second in following([*prompt, first]):
            for third, p_third in following([*prompt, first, second]):
                found[second, third] = found.get((second, third), 0.0) + p_first * p_second * p_third
    return found
