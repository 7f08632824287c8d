"""A draft that fuses states: one folder for both engines, read by each in its way, and every planted fault found."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_core.draft_config import DraftConfig
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.checkpoint import load_draft, warm_start
from hass_core.draft_model.engines import ENGINES
from hass_core.draft_model.identity import draft_identity
from hass_core.errors import DraftMismatch
from hass_core.export.checks import check_draft
from hass_core.export.importer import import_draft
from hass_core.target_model.loader import freeze
from tests.conftest import byte_tokenizer, tiny_llama
from tests.export import test_eagle3
from tests.export.test_checks import edit_config
from tests.export.test_eagle3 import BOTH, LAYER, SERVED, SIZE, drop, exported, put

TOP, COUNT = "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states"


@pytest.fixture(scope="module")
def target():
    """Ten layers: the states after 2, 5 and 7 of them are what engines take where nothing is named."""
    model = tiny_llama(num_hidden_layers=10)
    torch.manual_seed(2)
    model.model.norm.weight.data.uniform_(0.5, 1.5)
    return freeze(model, byte_tokenizer(), name="tiny")


def write_draft(folder: Path, target, size: int | None = SIZE, **settings: Any) -> Path:
    """One over three states, each normed, where the settings say nothing else."""
    return test_eagle3.write_draft(folder, target, size, **{"taps": "three", "fc_norm": True} | settings)


@pytest.mark.parametrize(
    ("size", "settings", "taps"),
    [
        (SIZE, {}, [2, 5, 7]),
        (None, {"fc_norm": False, "norm_output": True}, [2, 5, 7]),
        (SIZE, {"taps": (1, 9)}, [1, 9]),
    ],
    ids=["trimmed", "all tokens, bare", "two others"],
)
def test_one_folder_serves_both_engines_and_comes_back_as_it_was(target, tmp_path, size, settings, taps):
    draft = write_draft(tmp_path / "draft", target, size, **settings)
    source = read_draft(draft, target)
    folders = {engine: exported(draft, target, engine, tmp_path / engine) for engine in SERVED}
    configs = {engine: json.loads((folder / "config.json").read_text()) for engine, folder in folders.items()}
    assert configs["vllm"] == configs["sglang"]
    assert configs["vllm"][TOP] == taps
    assert configs["vllm"]["eagle_config"][TOP] == [layer - 1 for layer in taps]
    assert configs["vllm"][COUNT] == len(taps)
    for folder in folders.values():
        for engine in SERVED:
            assert check_draft(folder, target, ENGINES[engine], source) == []
            assert check_draft(folder, target, ENGINES[engine]) == []
        again = read_draft(import_draft(folder, target, folder.with_name(f"{folder.name} again")), target)
        assert draft_identity(again) == draft_identity(source)
        assert again.architecture.taps == tuple(taps)
        assert all(torch.equal(again.weights[name], tensor) for name, tensor in source.weights.items())


OF_TAPS = {
    "no list for vLLM": edit_config(**{TOP: None}),
    "no list for SGLang": edit_config(eagle_config={"use_aux_hidden_state": True}),
    "no list at all": edit_config(**{TOP: None, "eagle_config": {}}),
    "vLLM's list is one less": edit_config(**{TOP: [1, 4, 6]}),
    "SGLang's list is vLLM's": edit_config(eagle_config={TOP: [2, 5, 7]}),
    "both lists are one more": edit_config(**{TOP: [3, 6, 8], "eagle_config": {TOP: [2, 5, 7]}}),
    "descending": edit_config(**{TOP: [7, 5, 2], "eagle_config": {TOP: [6, 4, 1]}}),
    "a layer twice": edit_config(**{TOP: [2, 5, 5], "eagle_config": {TOP: [1, 4, 4]}}),
    "a layer that is not there": edit_config(**{TOP: [2, 5, 17], "eagle_config": {TOP: [1, 4, 16]}}),
    "the state after the last layer": edit_config(**{TOP: [2, 5, 10], "eagle_config": {TOP: [1, 4, 9]}}),
    "two layers named": edit_config(**{TOP: [2, 5], "eagle_config": {TOP: [1, 4]}}),
    "no count": edit_config(**{COUNT: None}),
    "another count": edit_config(**{COUNT: 2}),
    "switched off": edit_config(eagle_config={"use_aux_hidden_state": False}),
    "fc is missing": drop("fc.weight"),
    "fc takes two states": put("fc.weight", lambda t: t["fc.weight"][:, :96]),
    "fc's states are in another order": put("fc.weight", lambda t: torch.cat(t["fc.weight"].chunk(3, 1)[::-1], 1)),
    "a bias of fc": put("fc.bias", lambda t: torch.ones(48)),
    "fc_norm is off": edit_config(fc_norm=False),
    "a tap's norm is missing": drop("fc_norm.1.weight"),
    "a fourth norm": put("fc_norm.3.weight", lambda t: torch.ones(48)),
    "two norms are exchanged": put("fc_norm.0.weight", lambda t: t["fc_norm.2.weight"].clone()),
    "the states are normed together": edit_config(norm_before_fc=True),
    "a rule that nobody knows": edit_config(eagle_config={TOP: [1, 4, 6], "fuse_by_mean": True}),
}


@pytest.fixture(scope="module")
def clean(target, tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    draft = write_draft(root / "draft", target)
    return read_draft(draft, target), exported(draft, target, "vllm", root / "both")


@pytest.mark.parametrize("from_source", [True, False], ids=["beside its source", "alone"])
@pytest.mark.parametrize("engine", SERVED)
@pytest.mark.parametrize("fault", [*BOTH, *OF_TAPS])
def test_each_planted_fault_is_found(clean, target, tmp_path, engine, fault, from_source):
    source, folder = clean
    folder = Path(shutil.copytree(folder, tmp_path / "served"))
    (BOTH | OF_TAPS)[fault](folder)
    findings = check_draft(folder, target, ENGINES[engine], source if from_source else None)
    assert findings, fault
    assert all(str(finding) for finding in findings)


def as_public(draft: Path, **changes) -> Path:
    """Official files: layers.0 names, no rope fields, 2048 positions, nothing of this project's."""
    tensors = load_file(draft / "model.safetensors")
    save_file({name.replace(LAYER, "layers.0."): t for name, t in tensors.items()}, draft / "model.safetensors")
    config = json.loads((draft / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "hass", TOP, COUNT, "eagle_config", "fc_norm"):
        config.pop(name, None)
    (draft / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048} | changes))
    return draft


@pytest.mark.parametrize(
    ("named", "taps"),
    [
        ({}, (2, 5, 7)),
        ({TOP: [3, 4, 6]}, (3, 4, 6)),
        ({"eagle_config": {TOP: [2, 3, 5]}}, (3, 4, 6)),
        ({TOP: [3, 4, 6], "eagle_config": {TOP: [2, 3, 5]}}, (3, 4, 6)),
    ],
    ids=str,
)
def test_a_public_draft_is_imported_with_its_own_layers_rope_and_length_and_continued(target, tmp_path, named, taps):
    public = as_public(write_draft(tmp_path / "draft", target, fc_norm=False), **named)
    folder = import_draft(public, target, tmp_path / "imported")
    shape = read_draft(folder, target).architecture
    assert shape.taps == taps
    assert shape.rope_parameters == {"rope_theta": 10_000.0, "rope_type": "default"}
    assert shape.max_position_embeddings == 2048
    assert load_draft(folder, target).model.taps == taps
    same = DraftConfig(architecture="eagle3", taps=taps)
    assert warm_start(folder, target, same).architecture == shape
    with pytest.raises(DraftMismatch, match=re.escape(f"set draft.taps = {list(taps)}, or train from the start")):
        warm_start(folder, target, DraftConfig(architecture="eagle3"))


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({TOP: [3, 4, 6], "eagle_config": {TOP: [3, 4, 6]}}, "vLLM and SGLang would read other states"),
        ({TOP: [3, 4]}, "fc.weight fuses 3 states, and 2 layers are named"),
        ({TOP: [3, 4, 10]}, "which are not ascending ones from 1 to 9"),
        ({TOP: ["3", 4, 6]}, "no list of layers"),
        ({"norm_before_fc": True}, "norm_before_fc"),
        ({"eagle_config": {TOP: [2, 3, 5], "use_mtp_layernorm": True}}, "use_mtp_layernorm = True"),
        ({"eagle_config": {TOP: [2, 3, 5], "fuse_by_mean": 1}}, "eagle_config.fuse_by_mean = 1"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_meant_are_refused(target, tmp_path, named, says):
    public = as_public(write_draft(tmp_path / "draft", target, fc_norm=False), **named)
    with pytest.raises(DraftMismatch, match=re.escape(says)):
        import_draft(public, target, tmp_path / "imported")
