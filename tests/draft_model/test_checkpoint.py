"""Saving and loading drafts, and every refusal with both sides named."""

import dataclasses
import json

import pytest
import torch

from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import draft_info, load_draft, save_draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.errors import CorruptFile, DraftMismatch
from hass_core.target_model.identity import sampled_fingerprint


@pytest.fixture
def folder(tmp_path, tiny_target):
    draft = DraftModel(DraftArchitecture.from_target_config(tiny_target.model.config), tiny_target.embedding)
    head = DraftHead.from_target(tiny_target.head, torch.arange(0, 200, 2))
    save_draft(tmp_path / "draft", draft, head, draft_info(tiny_target, {"trained_steps": 7}))
    return tmp_path / "draft"


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_draft_comes_back_as_it_was(folder, tiny_target, tmp_path):
    draft = load_draft(folder, tiny_target)
    assert draft.info["trained_steps"] == 7
    assert draft.head.size == 100
    assert draft.head.to_target_ids(torch.tensor([3])).item() == 6
    assert draft.model.embedding is tiny_target.embedding, "the target's embedding is shared, not copied"
    save_draft(tmp_path / "again", draft.model, draft.head, draft.info)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_head_scores_only_its_own_tokens(folder, tiny_target):
    draft, features = load_draft(folder, tiny_target), torch.randn(5, 48)
    torch.testing.assert_close(draft.head.logits(features), (features @ tiny_target.head.T)[:, 0:200:2])
    assert draft.head.contains(torch.tensor([2, 3])).tolist() == [True, False]


def test_another_targets_draft_is_refused_naming_both(folder, tiny_target):
    identity = dataclasses.replace(tiny_target.identity, weights="other", config="other")
    other = dataclasses.replace(tiny_target, name="other", identity=identity)
    with pytest.raises(DraftMismatch, match=r"trained for tiny, which .* other in its weights and config"):
        load_draft(folder, other)
    assert load_draft(folder, other, check=False).info["target"] == "tiny"


def test_another_chat_template_is_refused(folder, tiny_target):
    other = dataclasses.replace(tiny_target, identity=dataclasses.replace(tiny_target.identity, template="feed"))
    with pytest.raises(DraftMismatch, match="in its template"):
        load_draft(folder, other)


def test_other_end_tokens_do_not_make_a_draft_anothers(folder, tiny_target):
    other = dataclasses.replace(tiny_target, identity=dataclasses.replace(tiny_target.identity, ends="feed"))
    assert load_draft(folder, other).info["target"] == "tiny"


@pytest.mark.parametrize(
    ("changed", "differing"),
    [({}, None), ({"target_fingerprint": "feed"}, "weights"), ({"template_hash": "feed"}, "template")],
)
def test_a_draft_from_before_identities_is_compared_by_what_it_tells(folder, tiny_target, changed, differing):
    elder = {
        "target": "tiny",
        "target_fingerprint": sampled_fingerprint(tiny_target.model),
        "template_hash": tiny_target.identity.template,
    }
    rewrite(folder, hass=elder | changed)
    if differing is None:
        assert load_draft(folder, tiny_target).info == elder
        return
    with pytest.raises(DraftMismatch, match=f"in its {differing}; train"):
        load_draft(folder, tiny_target)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size"])
def test_sizes_that_do_not_fit_are_refused_even_unchecked(folder, tiny_target, name):
    rewrite(folder, **{name: 1000})
    with pytest.raises(DraftMismatch, match=rf"its {name} is 1000, the target's is \d+"):
        load_draft(folder, tiny_target, check=False)


def test_weights_that_do_not_fit_their_config_are_refused(folder, tiny_target):
    rewrite(folder, intermediate_size=64)
    with pytest.raises(DraftMismatch, match=r"does not fit its config\.json"):
        load_draft(folder, tiny_target)


def test_a_vocabulary_with_unknown_tokens_is_refused(folder, tiny_target):
    (folder / "draft_vocab.json").write_text("[1, 2, 100000]")
    with pytest.raises(DraftMismatch, match="outside the target's vocabulary of 259"):
        load_draft(folder, tiny_target)


def test_a_missing_or_cut_file_is_named(folder, tiny_target):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CorruptFile, match="is not a readable safetensors file"):
        load_draft(folder, tiny_target)
    weights.unlink()
    with pytest.raises(CorruptFile, match=r"model\.safetensors.* is missing"):
        load_draft(folder, tiny_target)


def test_the_config_says_nothing_engines_misread(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["bias"] is False
    assert "attention_bias" not in config
    assert config["num_hidden_layers"] == 1
