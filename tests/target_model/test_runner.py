"""Runners against the models' own forward pass: whole prompts, steps, ragged batches, trees, roll-back."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from hass_core.draft_model.head import DraftHead
from hass_core.errors import TargetError
from hass_core.target_model.block import side_by_side
from hass_core.target_model.generic import HFRunner
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import FusedRunner, Runner, make_runner
from tests.target_model.conftest import OTHERS, VARIANTS, tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # float32, two layers: rounding in another order


def truth(target: Target, token_ids: list[int]) -> torch.Tensor:
    """Features [L, H] by the model's own uncached forward pass."""
    with torch.no_grad():
        out = target.model(torch.tensor([token_ids]), output_hidden_states=True)
    return out.hidden_states[-1][0]


def random_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=[FusedRunner, HFRunner])
def runner(request, any_target) -> tuple[Runner, Target]:
    return request.param(any_target), any_target


def test_prefill_and_single_steps_equal_the_models_own_forward(runner):
    run, target = runner
    ids = random_ids(24)
    cache = run.new_cache(1, 64)
    parts = [run.forward(torch.tensor([ids[:17]]), torch.arange(17)[None], cache)]
    cache.advance(17)
    for position in range(17, 24):
        parts.append(run.forward(torch.tensor([[ids[position]]]), torch.tensor([[position]]), cache))
        cache.advance(1)
    torch.testing.assert_close(torch.cat(parts, 1)[0], truth(target, ids), **CLOSE)


def test_rows_of_different_lengths_do_not_see_each_other_nor_their_padding(runner):
    run, target = runner
    rows = [random_ids(n, seed=n) for n in (5, 19, 11)]
    cache = run.new_cache(3, 40)
    padded = torch.zeros(3, 19, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    first = run.forward(padded, torch.arange(19).expand(3, -1), cache)
    cache.advance([5, 19, 11])
    following = torch.tensor([random_ids(2, seed=9)] * 3)
    second = run.forward(following, cache.lengths[:, None] + torch.arange(2), cache)
    for i, row in enumerate(rows):
        expected = truth(target, row + following[i].tolist())
        torch.testing.assert_close(first[i, : len(row)], expected[: len(row)], **CLOSE)
        torch.testing.assert_close(second[i], expected[len(row) :], **CLOSE)


@pytest.mark.parametrize("batch", [1, 2])
def test_tree_rows_see_their_ancestors_only_and_the_kept_path_lives_on(runner, batch):
    run, target = runner
    prompts = [random_ids(n, seed=n) for n in (9, 14)][:batch]
    cache = run.new_cache(batch, 48)
    padded = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    run.forward(padded, torch.arange(padded.shape[1]).expand(batch, -1), cache)
    cache.advance([len(prompt) for prompt in prompts])
    tree = torch.tensor([random_ids(5, seed=3)] * batch)  # 0 ── 1 ── 3, 0 ── 2 ── 4
    depth = torch.tensor([0, 1, 1, 2, 2])
    parents = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]
    visible = torch.zeros(batch, 5, 5, dtype=torch.bool)
    for node, seen in enumerate(parents):
        visible[:, node, seen] = True
    features = run.forward(tree, cache.lengths[:, None] + depth, cache, visible)
    for b, prompt in enumerate(prompts):
        for node, path in enumerate(parents):
            expected = truth(target, prompt + tree[b, path].tolist())[-1]
            torch.testing.assert_close(features[b, node], expected, **CLOSE)
    cache.move(torch.tensor([[0, 2, 4]] * batch))
    cache.advance([3, 2][:batch])
    after = run.forward(torch.tensor([[7]] * batch), cache.lengths[:, None], cache)
    for b, prompt in enumerate(prompts):
        kept = tree[b, [0, 2, 4]].tolist()[: [3, 2][b]]
        torch.testing.assert_close(after[b, 0], truth(target, [*prompt, *kept, 7])[-1], **CLOSE)


CHANGED_LOGITS = {"cohere", "gemma2", "granite"}
BIASED_HEAD = {"phi"}


@pytest.mark.parametrize("variant", VARIANTS | OTHERS)
def test_a_familys_logits_are_the_models_own_or_it_is_refused_when_it_is_loaded(variant):
    if variant in CHANGED_LOGITS | BIASED_HEAD:
        with pytest.raises(TargetError, match="has a bias" if variant in BIASED_HEAD else "changes its logits"):
            tiny_model(variant)
        return
    target = tiny_model(variant)
    run, ids = make_runner(target), torch.tensor([random_ids(20)])
    features = run.forward(ids, torch.arange(20)[None], run.new_cache(1, 32))
    with torch.no_grad():
        expected = target.model(ids).logits
    torch.testing.assert_close(run.logits(features), expected, **CLOSE)
    torch.testing.assert_close(DraftHead.from_target(target.head).logits(features), expected, **CLOSE)


def test_a_longrope_target_is_used_as_far_as_its_short_factors_hold():
    assert tiny_model("phi3, longrope").context_tokens == 64
    assert tiny_model("phi3").context_tokens == 256


def test_logits_equal_the_models_own(any_target):
    run = make_runner(any_target)
    ids = torch.tensor([random_ids(12)])
    features = run.forward(ids, torch.arange(12)[None], run.new_cache(1, 16))
    with torch.no_grad():
        torch.testing.assert_close(run.logits(features), any_target.model(ids).logits, **CLOSE)


@pytest.mark.parametrize("packs", [True, False])
def test_a_runner_leaves_the_model_as_it_was(monkeypatch, packs):
    monkeypatch.setattr("hass_core.target_model.block.packable", lambda weight: packs)
    target, ids = tiny_model("qwen2"), random_ids(10)
    before = truth(target, ids)
    FusedRunner(target)
    torch.testing.assert_close(truth(target, ids), before, atol=1e-6, rtol=1e-6)


def test_weights_side_by_side_are_views_of_one_tensor_made_once():
    mlp = tiny_model("llama").model.model.layers[0].mlp
    gate = mlp.gate_proj.weight.clone()
    whole = side_by_side([mlp.gate_proj, mlp.up_proj])
    assert whole.data_ptr() == mlp.gate_proj.weight.data_ptr() == side_by_side([mlp.gate_proj, mlp.up_proj]).data_ptr()
    assert torch.equal(mlp.gate_proj.weight, gate)
    assert torch.equal(whole, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))


@pytest.mark.parametrize("variant", ["mistral, window", "qwen2, window", "qwen3, window", "gemma3_text"])
def test_a_sliding_window_is_kept_by_steps_and_trees(variant):
    target = tiny_model(variant)
    run = make_runner(target)
    assert isinstance(run, HFRunner)
    prompt = random_ids(20)
    cache = run.new_cache(1, 48)
    whole = run.forward(torch.tensor([prompt]), torch.arange(20)[None], cache)
    torch.testing.assert_close(whole[0], truth(target, prompt), **CLOSE)
    cache.advance(20)
    tree, depth = torch.tensor([random_ids(4, seed=3)]), torch.tensor([0, 1, 1, 2])
    paths = [[0], [0, 1], [0, 2], [0, 2, 3]]
    visible = torch.zeros(1, 4, 4, dtype=torch.bool)
    for node, path in enumerate(paths):
        visible[0, node, path] = True
    features = run.forward(tree, 20 + depth[None], cache, visible)
    for node, path in enumerate(paths):
        torch.testing.assert_close(features[0, node], truth(target, prompt + tree[0, path].tolist())[-1], **CLOSE)


def test_other_families_take_the_generic_runner():
    assert isinstance(make_runner(tiny_model("gpt_neox")), HFRunner)
    assert isinstance(make_runner(tiny_model("llama")), FusedRunner)


def test_models_that_cannot_be_decoded_exactly_are_refused_by_name():
    with pytest.raises(TargetError, match="cohere changes its logits after the output projection"):
        tiny_model("cohere")
    with pytest.raises(TargetError, match=r"qwen3_next has layers of kind \['linear_attention'\]"):
        tiny_model("qwen3_next")


def test_a_cache_cleared_is_a_cache_unused(tiny_target):
    run = make_runner(tiny_target)
    cache, ids = run.new_cache(1, 32), torch.tensor([random_ids(20)])
    run.forward(ids, torch.arange(20)[None], cache)
    cache.advance(20)
    cache.clear()
    again = run.forward(ids[:, :8], torch.arange(8)[None], cache)
    torch.testing.assert_close(again[0], truth(tiny_target, ids[0, :8].tolist()), **CLOSE)
