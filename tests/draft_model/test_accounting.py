"""No tensor of a draft's folder is dropped or invented: each is carried, or the draft is refused with its name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hass_core.draft_config import DraftConfig
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.checkpoint import draft_model, load_draft, warm_start
from hass_core.draft_model.identity import draft_identity
from hass_core.errors import CorruptFile, DraftMismatch
from tests.draft_model.conftest import tensors_of


@pytest.mark.parametrize(
    "traits",
    [{"qkv_bias": True}, {"qkv_bias": True, "o_bias": True}, {"o_bias": True}, {"qk_norm": True}, {"fc_bias": True}],
    ids=str,
)
def test_every_bias_and_norm_arrives_and_is_used(write, architecture, tiny_target, traits):
    shape = architecture.model_copy(update=traits)
    stored = read_draft(write(shape=shape), tiny_target)
    assert stored.architecture == shape
    assert all(torch.equal(stored.weights[name], tensor) for name, tensor in tensors_of(shape).items())
    draft, inputs = load_draft(stored.folder, tiny_target), (torch.arange(5)[None], torch.randn(1, 5, 48))
    before = draft.model(*inputs, torch.arange(5)[None])
    added = [name for name in shape.tensors() if name not in architecture.tensors()]
    for name in added:
        state = draft.model.state_dict()
        state[name] = state[name] + torch.randn_like(state[name])
        draft.model.load_state_dict(state)
        assert not torch.allclose(draft.model(*inputs, torch.arange(5)[None]), before), name


@pytest.mark.parametrize(
    "name",
    [
        *("embed_layernorm.weight", "hidden_layernorm.weight", "layers.0.input_layernorm.weight", "norm.weight"),
        *("layers.1.mlp.up_proj.weight", "layers.0.mlp.up_proj.bias", "layers.0.self_attn.sinks", "lm_head.weight"),
    ],
)
def test_a_tensor_without_a_place_is_named(write, tiny_target, name):
    with pytest.raises(DraftMismatch, match=name.replace(".", r"\.")):
        read_draft(write({name: torch.rand(259, 48) if name == "lm_head.weight" else torch.rand(48)}), tiny_target)


def test_the_targets_own_embedding_and_head_are_no_news(write, tiny_target):
    folder = write({"embed_tokens.weight": tiny_target.embedding.clone(), "lm_head.weight": tiny_target.head.clone()})
    assert read_draft(folder, tiny_target).embedding is None
    own = tiny_target.embedding + 1
    stored = read_draft(write({"embed_tokens.weight": own}), tiny_target)
    assert stored.embedding is not None
    assert torch.equal(stored.embedding, own)
    with pytest.raises(DraftMismatch, match=r"embed_tokens\.weight of its own, and training shares the target's"):
        warm_start(stored.folder, tiny_target)


def test_rotary_frequencies_in_the_file_must_be_those_of_the_config(write, tiny_target):
    frequencies = 1e4 ** -(torch.arange(0, 12, 2) / 12)
    read_draft(write({"layers.0.self_attn.rotary_emb.inv_freq": frequencies}), tiny_target)
    with pytest.raises(DraftMismatch, match="inv_freq has no place"):
        read_draft(write({"layers.0.self_attn.rotary_emb.inv_freq": frequencies / 2}), tiny_target)


@pytest.mark.parametrize("name", ["layers.0.self_attn.o_proj.weight", "layers.0.mlp.gate_proj.weight"])
def test_a_missing_tensor_is_named(write, architecture, tiny_target, name):
    folder = write()
    tensors = {key: tensor for key, tensor in tensors_of(architecture).items() if key != name}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DraftMismatch, match=rf"it lacks {name}".replace(".", r"\.")):
        load_draft(folder, tiny_target)


@pytest.mark.parametrize(
    ("claim", "names"),
    [("qkv_bias", "q_proj.bias"), ("qk_norm", "q_norm.weight"), ("bias", "fc.bias")],
)
def test_what_the_config_says_is_there_must_be_there(write, tiny_target, claim, names):
    with pytest.raises(DraftMismatch, match=f'says "{claim}", but the tensors lack .*{names}'):
        read_draft(write(**{claim: True}), tiny_target)


def test_one_bias_of_three_is_not_enough(write, tiny_target):
    with pytest.raises(DraftMismatch, match=r"lacks layers\.0\.self_attn\.k_proj\.bias, layers\.0\.self_attn\.v_proj"):
        read_draft(write({"layers.0.self_attn.q_proj.bias": torch.ones(48)}), tiny_target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(write, tiny_target, value):
    broken = torch.zeros(48, 96)
    broken[0, 0] = value
    with pytest.raises(DraftMismatch, match=r"fc\.weight holds NaN or infinite numbers"):
        read_draft(write({"fc.weight": broken}), tiny_target)


def shard(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Divide a folder's tensors among two files, and return the index's weight_map."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, part in parts.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_shards_are_read_through_their_index(write, architecture, tiny_target):
    folder, tensors = write(), tensors_of(architecture)
    whole = draft_identity(read_draft(folder, tiny_target))
    shard(folder, tensors)
    stored = read_draft(folder, tiny_target)
    assert all(torch.equal(stored.weights[name], tensor) for name, tensor in tensors.items())
    assert draft_identity(stored) == whole
    begun = draft_model(warm_start(folder, tiny_target), tiny_target.embedding)
    assert torch.equal(begun.fc.weight, tensors["fc.weight"])


def test_shards_and_index_that_disagree_are_refused(write, architecture, tiny_target):
    folder, tensors = write(), tensors_of(architecture)
    places, index = shard(folder, tensors), folder / "model.safetensors.index.json"

    def says(**changed):
        index.write_text(json.dumps({"weight_map": places | changed}))
        with pytest.raises(CorruptFile) as refused:
            read_draft(folder, tiny_target)
        return str(refused.value)

    assert "model-3.safetensors is missing" in says(**{"norm.weight": "model-3.safetensors"})
    assert "names norm.weight" in says(**{"norm.weight": "model-00001-of-00002.safetensors"})
    assert "outside of its folder" in says(**{"norm.weight": "../else.safetensors"})
    del places["fc.weight"]
    assert "holds fc.weight, which" in says()
    shard(folder, tensors)
    save_file(tensors, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(CorruptFile, match=r"holds model-00003-of-00003\.safetensors beside"):
        read_draft(folder, tiny_target)


def test_the_identity_is_the_contents_alone(write, architecture, tiny_target):
    first = draft_identity(read_draft(write(hass={"val_tau": 1.0, "target": "a"}), tiny_target))
    zeros = {"fc.bias": torch.zeros(48), "layers.0.self_attn.o_proj.bias": torch.zeros(48)}
    assert draft_identity(read_draft(write(zeros, name="elsewhere"), tiny_target)) == first
    assert draft_identity(read_draft(write(rms_norm_eps=1e-5), tiny_target)) != first
    assert draft_identity(read_draft(write(rope_theta=5e5), tiny_target)) != first
    fc = tensors_of(architecture)["fc.weight"]
    fc[0, 0] += 1e-6
    assert draft_identity(read_draft(write({"fc.weight": fc}), tiny_target)) != first
    folder = write()
    (folder / "draft_vocab.json").write_text("[1, 2, 3]")
    assert draft_identity(read_draft(folder, tiny_target)) != first


@pytest.mark.parametrize("content", ["{}", "[1, 1]", "[1, true]", "[1.5]", "[", '["a"]', "[-1]"])
def test_a_list_of_tokens_that_is_none_is_refused(write, tiny_target, content):
    folder = write()
    (folder / "draft_vocab.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"draft_vocab\.json"):
        load_draft(folder, tiny_target)


def test_a_warm_start_keeps_the_drafts_own_architecture(write, architecture, tiny_target):
    shape = architecture.model_copy(
        update={"qkv_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    folder = write(shape=shape)
    stored = warm_start(folder, tiny_target)
    assert draft_model(stored, tiny_target.embedding).architecture == shape
    with pytest.raises(DraftMismatch, match=r'not of draft\.family = "llama": it has .*q_proj\.bias'):
        warm_start(folder, tiny_target, DraftConfig(family="llama"))
    with pytest.raises(CorruptFile, match=r"draft\.warm_start: .* is missing"):
        warm_start(folder / "nowhere", tiny_target)


def test_a_bias_of_zeros_says_nothing_whatever_layer_it_is_of(write, tiny_target):
    whole = draft_identity(read_draft(write(), tiny_target))
    zeros = {f"layers.0.mlp.{part}_proj.bias": torch.zeros(96) for part in ("gate", "up")}
    zeros |= {"layers.0.mlp.down_proj.bias": torch.zeros(48), "layers.0.self_attn.o_proj.bias": torch.zeros(48)}
    assert draft_identity(read_draft(write(zeros, name="zeros", mlp_bias=True), tiny_target)) == whole
    for bias in (torch.full((96,), 0.1), torch.zeros(7)):
        with pytest.raises(DraftMismatch, match=r"layers\.0\.mlp\.up_proj\.bias has no place"):
            read_draft(write({"layers.0.mlp.up_proj.bias": bias}), tiny_target)
    with pytest.raises(DraftMismatch, match=r"fc\.bias does not fit its config\.json"):
        read_draft(write({"fc.bias": torch.zeros(7)}), tiny_target)


def test_an_own_embedding_is_looked_at_like_any_tensor(write, tiny_target):
    own = tiny_target.embedding + 1
    with pytest.raises(DraftMismatch, match=r"tie_word_embeddings.*a draft uses the target's head"):
        read_draft(write({"embed_tokens.weight": own}, tie_word_embeddings=True), tiny_target)
    own[3, 3] = float("nan")
    with pytest.raises(DraftMismatch, match=r"embed_tokens\.weight holds NaN"):
        read_draft(write({"embed_tokens.weight": own}), tiny_target)


def test_the_tokens_that_are_drafted_are_those_of_the_record(write, tiny_target):
    folder = write(hass={"draft_vocab_size": 3})
    with pytest.raises(DraftMismatch, match=r"drafts 3 tokens by its config\.json, and there is no draft_vocab\.json"):
        read_draft(folder, tiny_target)
    (folder / "draft_vocab.json").write_text("[1, 2]")
    with pytest.raises(DraftMismatch, match=r"and draft_vocab\.json names 2"):
        read_draft(folder, tiny_target)
    (folder / "draft_vocab.json").write_text("[1, 2, 300]")
    with pytest.raises(DraftMismatch, match="outside the target's vocabulary of 259"):
        read_draft(folder, tiny_target)
    (folder / "draft_vocab.json").write_text("[1, 2, 3]")
    assert load_draft(folder, tiny_target).head.size == 3


def test_a_pickle_is_one_of_numbers_under_names_and_says_what_the_other_file_says(write, architecture, tiny_target):
    folder, tensors = write(), tensors_of(architecture)
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    read_draft(folder, tiny_target)  # the same draft twice
    tensors["fc.weight"][0, 0] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CorruptFile, match=r"both model\.safetensors and pytorch_model\.bin, which differ"):
        read_draft(folder, tiny_target)
    (folder / "model.safetensors").unlink()
    sparse, absent = tensors["fc.weight"].to_sparse(), torch.empty(48, 96, device="meta")
    for broken in (tensors | {"fc.weight": sparse}, tensors | {"fc.weight": absent}, {1: torch.ones(2)}):
        torch.save(broken, folder / "pytorch_model.bin")
        with pytest.raises(CorruptFile, match=r"not a plain file of tensors: .* is none"):
            read_draft(folder, tiny_target)
