"""The second architecture in both engines' layouts: a clean export has no fault, and each planted one is found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_core.config import TreeConfig
from hass_core.draft_config import DraftConfig
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.checkpoint import draft_info, load_draft, save_draft
from hass_core.draft_model.engines import ENGINES
from hass_core.draft_model.family import new_architecture
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.identity import draft_identity
from hass_core.draft_model.layers import build_draft
from hass_core.errors import DraftMismatch, HassError
from hass_core.export.checks import check_draft
from hass_core.export.exporter import export_draft
from hass_core.export.importer import import_draft
from hass_core.target_model.loader import freeze
from tests.conftest import byte_tokenizer, tiny_llama
from tests.export.test_checks import edit_config, edit_tensors

CHAIN = TreeConfig(kind="chain", depth=3, nodes=4)
SERVED = ("vllm", "sglang")
SIZE = 100
HEAD = "lm_head.weight"


def write_draft(folder: Path, target, size: int | None = SIZE, **settings: Any) -> Path:
    """A draft folder as training by `draft.…` leaves it, with weights and norms that are nowhere at their initial
    values."""
    torch.manual_seed(1)
    rows = target.head.shape[0]
    shape = new_architecture(target.model.config, DraftConfig(architecture="eagle3", **settings), size or rows)
    model = build_draft(shape, target.embedding.float())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1))
    token_ids = torch.randperm(rows)[:size].sort().values if size else None
    save_draft(folder, model, DraftHead.from_target(target.head, token_ids), draft_info(target))
    return folder


@pytest.fixture(scope="module")
def normed_target():
    """A target whose final norm is not all ones, or its place could not be told."""
    model = tiny_llama()
    torch.manual_seed(2)
    model.model.norm.weight.data.uniform_(0.5, 1.5)
    return freeze(model, byte_tokenizer(), name="tiny")


def exported(draft: Path, target, engine: str, out: Path) -> Path:
    return export_draft(draft, target, engine, out, CHAIN, "org/target")


@pytest.mark.parametrize("engine", SERVED)
@pytest.mark.parametrize(("size", "norm_output"), [(SIZE, False), (None, True)], ids=["trimmed", "all tokens, normed"])
def test_an_export_is_clean_and_comes_back_as_it_was(normed_target, tmp_path, engine, size, norm_output):
    draft = write_draft(tmp_path / "draft", normed_target, size, norm_output=norm_output)
    source, folder = read_draft(draft, normed_target), exported(draft, normed_target, engine, tmp_path / engine)
    assert check_draft(folder, normed_target, ENGINES[engine], source) == []
    assert check_draft(folder, normed_target, ENGINES[engine]) == []
    assert ("d2t" in load_file(folder / "model.safetensors")) == (size is not None)
    again = read_draft(import_draft(folder, normed_target, tmp_path / "again"), normed_target)
    assert again.architecture.model_dump(exclude={"max_position_embeddings"}) == source.architecture.model_dump(
        exclude={"max_position_embeddings"}
    )
    assert again.weights.keys() == source.weights.keys()
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in source.weights.items())
    assert (again.vocabulary is None) == (size is None)
    assert size is None or torch.equal(again.vocabulary, source.vocabulary)
    card = (folder / "README.md").read_text()
    assert ('"method": "eagle3"' if engine == "vllm" else "--speculative-algorithm EAGLE3") in card
    assert f"drafts among {size or 'all'} of its tokens" in card


def test_what_an_engine_cannot_hold_is_refused(normed_target, tmp_path):
    draft = write_draft(tmp_path / "draft", normed_target)
    with pytest.raises(DraftMismatch, match=r"EAGLE.* fuses three states of its own choice"):
        exported(draft, normed_target, "eagle", tmp_path / "out")
    edit_config(rms_norm_eps=1e-3)(draft)
    exported(draft, normed_target, "sglang", tmp_path / "sglang")
    with pytest.raises(DraftMismatch, match="two epsilons of norms"):
        exported(draft, normed_target, "vllm", tmp_path / "vllm")


def drop(*names):
    return edit_tensors(lambda t: [t.pop(name) for name in names])


def put(name, change):
    return edit_tensors(lambda t: t.update({name: change(t)}))


def renamed(rename):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")

    return edit


LAYER = "midlayer."
Q, K = LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight"
BOTH = {
    "a projection is missing": drop(Q),
    "a norm is missing": drop(LAYER + "hidden_norm.weight"),
    "the final norm is missing": drop("norm.weight"),
    "the head is missing": drop("lm_head.weight"),
    "d2t is missing": drop("d2t"),
    "d2t holds token ids": put("d2t", lambda t: t["d2t"] + torch.arange(SIZE)),
    "d2t is one off": put("d2t", lambda t: t["d2t"] - 1),
    "the head's rows are in another order": put("lm_head.weight", lambda t: t["lm_head.weight"].flip(0)),
    "feature first": put(Q, lambda t: torch.cat(t[Q].chunk(2, 1)[::-1], 1)),
    "the two norms are exchanged": edit_tensors(
        lambda t: t.update(
            {
                LAYER + "hidden_norm.weight": t[LAYER + "input_layernorm.weight"],
                LAYER + "input_layernorm.weight": t[LAYER + "hidden_norm.weight"].clone(),
            }
        )
    ),
    "a value is changed": put(K, lambda t: t[K] * 1.05),
    "a value is NaN": put(K, lambda t: t[K] * torch.nan),
    "a bias of q": put(LAYER + "self_attn.q_proj.bias", lambda t: torch.ones(len(t[Q]))),
    "names have a prefix": renamed(lambda name: "model." + name),
    "norm_output": edit_config(norm_output=True),
    "norm_before_residual": edit_config(norm_before_residual=True),
    "attention_bias": edit_config(attention_bias=True),
    "another rope base": edit_config(rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "another epsilon": edit_config(rms_norm_eps=1e-2),
    "the class of EAGLE-1": edit_config(architectures=["LlamaForCausalLMEagle"]),
    "a context too short": edit_config(max_position_embeddings=64),
    "two layers": edit_config(num_hidden_layers=2),
    "a tied head": edit_config(tie_word_embeddings=True),
    "another number of heads": edit_config(num_attention_heads=2, num_key_value_heads=2),
    "all tokens drafted": edit_config(draft_vocab_size=None),
}
OF_ENGINE = {
    "vllm": {
        "fc is not the identity": put("fc.weight", lambda t: 2 * t["fc.weight"]),
        "fc is missing": drop("fc.weight"),
        "the tap's norm is missing": drop("fc_norm.0.weight"),
        "the tap's norm is another": put("fc_norm.0.weight", lambda t: torch.ones_like(t["fc_norm.0.weight"])),
        "fc_norm": edit_config(fc_norm=False),
        "the layer before": edit_config(eagle_aux_hidden_state_layer_ids=[1]),
        "no layer named": edit_config(eagle_aux_hidden_state_layer_ids=None),
        "three taps": edit_config(num_aux_hidden_states=3),
        "SGLang's switch": edit_config(eagle_config={"use_aux_hidden_state": False}),
    },
    "sglang": {
        "the switch is missing": edit_config(eagle_config={}),
        "a fusion": put("fc.weight", lambda t: torch.eye(48)),
    },
}
FAULTS = [(e, fault) for e in SERVED for fault in (*BOTH, *OF_ENGINE[e])]


@pytest.fixture(scope="module")
def clean(normed_target, tmp_path_factory):
    """Engines → folders of clean exports, made once; with the target and the draft."""
    root = tmp_path_factory.mktemp("clean")
    draft = write_draft(root / "draft", normed_target)
    folders = {engine: exported(draft, normed_target, engine, root / engine) for engine in SERVED}
    return normed_target, read_draft(draft, normed_target), folders


@pytest.mark.parametrize("from_source", [True, False], ids=["beside its source", "alone"])
@pytest.mark.parametrize(("engine", "fault"), FAULTS)
def test_each_planted_fault_is_found(clean, tmp_path, engine, fault, from_source):
    """Without its source an export is known by the identity in its record."""
    target, source, folders = clean
    folder = Path(shutil.copytree(folders[engine], tmp_path / "served"))
    (BOTH | OF_ENGINE[engine])[fault](folder)
    findings = check_draft(folder, target, ENGINES[engine], source if from_source else None)
    assert findings, fault
    assert all(str(finding) for finding in findings)


def test_a_public_draft_keeps_its_own_rope_and_length(normed_target, tmp_path):
    """Official files: layers.0 names, no rope fields, 2048 positions, t2d, the head over all tokens left out."""
    draft = write_draft(tmp_path / "draft", normed_target, size=None)
    tensors = load_file(draft / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file({name.replace(LAYER, "layers.0."): t for name, t in tensors.items()}, draft / "model.safetensors")
    config = json.loads((draft / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "draft_vocab_size", "hass"):
        config.pop(name, None)
    (draft / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    out = import_draft(draft, normed_target, tmp_path / "imported")
    stored = read_draft(out, normed_target)
    assert stored.architecture.rope_parameters == {"rope_theta": 10_000.0, "rope_type": "default"}
    assert stored.architecture.max_position_embeddings == 2048
    assert not torch.equal(stored.weights["lm_head.weight"], head)
    assert torch.equal(stored.weights["lm_head.weight"], normed_target.head)
    assert load_draft(out, normed_target).head.size == normed_target.head.shape[0]


def test_three_states_of_a_target_with_too_few_layers_are_refused(normed_target, tmp_path):
    draft = write_draft(tmp_path / "draft", normed_target)
    put("fc.weight", lambda t: torch.zeros(48, 144))(draft)
    edit_config(eagle_config={})(draft)
    with pytest.raises(DraftMismatch, match=r"it fuses states of the target and names no layers .* not three in order"):
        import_draft(draft, normed_target, tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        *({"draft_vocab_size": value} for value in ("many", True, -1, 1.5, 10**9)),
        *({"eagle_config": "x"}, {"eagle_config": [1]}, {"eagle_aux_hidden_state_layer_ids": 2}, {"rms_norm_eps": "1"}),
    ],
    ids=str,
)
def test_fields_of_another_kind_are_refused_in_one_sentence(normed_target, tmp_path, config):
    draft = write_draft(tmp_path / "draft", normed_target)
    edit_config(**config)(draft)
    with pytest.raises(HassError, match=f"{next(iter(config))}|d2t"):
        read_draft(draft, normed_target)


def test_the_identity_does_not_depend_on_the_engine(clean):
    target, _, folders = clean
    vllm, sglang = (draft_identity(read_draft(folders[engine], target)) for engine in SERVED)
    assert vllm == sglang


def test_tokens_in_another_order_need_a_head_of_their_own(normed_target, tmp_path):
    draft = write_draft(tmp_path / "draft", normed_target, size=None)
    tensors = load_file(draft / "model.safetensors")
    rows = len(tensors.pop(HEAD))
    tensors["d2t"] = torch.randperm(rows, generator=torch.Generator().manual_seed(3)) - torch.arange(rows)
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(DraftMismatch, match=f"lacks {HEAD}"):  # the target's would be read by other tokens' rows
        read_draft(draft, normed_target)
