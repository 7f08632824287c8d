"""A target's identity: changes with whatever decides a result, part by part, and with nothing else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers

from hass_core.config import TargetConfig
from hass_core.store.content import content_of, remembered
from hass_core.target_model.identity import TargetIdentity, tensor_digest
from hass_core.target_model.loader import load_target
from tests.conftest import byte_tokenizer, tiny_llama

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def identity(folder: Path, dtype: str = "float32") -> TargetIdentity:
    config = TargetConfig.model_validate({"source": str(folder), "dtype": dtype, "device": "cpu"})
    return load_target(config).identity


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def changed(before: TargetIdentity, after: TargetIdentity) -> set[str]:
    assert (before.digest == after.digest) == (before == after)
    return set(after.differing(before.parts()))


def test_it_does_not_follow_precision_shards_format_or_place(folder, tmp_path):
    before = identity(folder)
    assert identity(folder, "bfloat16") == before
    moved = folder.rename(tmp_path / "elsewhere")
    assert identity(moved) == before
    (moved / WEIGHTS).unlink()
    tiny_llama().save_pretrained(moved, max_shard_size="50KB")
    assert len(list(moved.glob("model-*.safetensors"))) > 1
    assert identity(moved) == before
    for shard in moved.glob("model*"):
        shard.unlink()
    torch.save(tiny_llama().state_dict(), moved / "pytorch_model.bin")
    assert identity(moved) == before


def test_a_model_in_memory_has_the_identity_of_its_files(folder, tiny_target):
    assert tiny_target.identity == identity(folder)


def test_the_same_numbers_have_one_digest_in_every_type_that_holds_them():
    numbers = torch.randn(7, 5).bfloat16()
    assert tensor_digest(numbers) == tensor_digest(numbers.float())
    assert tensor_digest(numbers.half()) == tensor_digest(numbers.half().float())
    finer = numbers.float()
    finer[3, 2] += 1e-6
    assert tensor_digest(finer) != tensor_digest(numbers)
    assert tensor_digest(numbers.reshape(5, 7)) != tensor_digest(numbers)


def test_one_number_among_all_changes_the_weights(folder):
    before = identity(folder)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][77, 31] += 1e-6
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert changed(before, identity(folder)) == {"weights"}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": 256},
        {"bos_token_id": 5},
    ],
)
def test_what_the_forward_pass_depends_on_changes_the_configuration(folder, fields):
    before = identity(folder)
    edit(folder / "config.json", **fields)
    assert changed(before, identity(folder)) == {"config"}


@pytest.mark.parametrize(
    "fields",
    [
        {"_name_or_path": "elsewhere", "architectures": ["Other"], "transformers_version": "1.0"},
        {"dtype": "bfloat16", "use_cache": False, "initializer_range": 0.9},
        {"attention_dropout": 0.1, "pad_token_id": 7, "a_new_field": None, "another": False},
    ],
)
def test_names_types_and_settings_of_training_change_nothing(folder, fields):
    before = identity(folder)
    edit(folder / "config.json", **fields)
    assert identity(folder) == before


def test_a_default_that_is_written_out_changes_nothing(folder):
    before = identity(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("hidden_act")
    (folder / "config.json").write_text(json.dumps(config | {"mlp_bias": False}))
    assert identity(folder) == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_are_a_part_of_their_own_wherever_they_stand(folder, name):
    before = identity(folder)
    edit(folder / name, eos_token_id=[2, 5])
    assert changed(before, identity(folder)) == {"ends"}


def test_a_tokenizer_changes_with_its_vocabulary_its_normaliser_and_its_special_tokens(folder):
    before = identity(folder)
    file = folder / "tokenizer.json"
    original = file.read_text()
    tokenizer = Tokenizer.from_str(original)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(file))
    assert changed(before, identity(folder)) == {"tokenizer"}
    content = json.loads(original)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    assert changed(before, identity(folder)) == {"tokenizer"}
    file.write_text(original)
    edit(folder / "tokenizer_config.json", bos_token="<|im_end|>")
    assert changed(before, identity(folder)) == {"tokenizer"}


def test_a_tokenizer_in_use_is_the_tokenizer_as_loaded(folder):
    target = load_target(TargetConfig(source=str(folder), device="cpu"))
    target.tokenizer("a", padding="max_length", truncation=True, max_length=7)
    from hass_core.target_model.identity import tokenizer_digest

    assert tokenizer_digest(target.tokenizer) == target.identity.tokenizer


def test_a_template_is_a_part_of_its_own(folder):
    before = identity(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert changed(before, identity(folder)) == {"template"}


def test_a_file_is_read_once_until_it_changes_even_with_its_times_set_back(tmp_path, monkeypatch):
    monkeypatch.setenv("HASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hass_core.store.content.SETTLED_SECONDS", -1)
    file, read = tmp_path / "file", []

    def find(path: Path) -> int:
        read.append(path)
        return path.stat().st_size

    file.write_bytes(b"12345")
    assert [remembered(file, "size", find), remembered(file, "size", find)] == [5, 5]
    assert len(read) == 1
    times = file.stat()
    first = content_of(file)
    file.write_bytes(b"54321")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_of(file) != first
    next((tmp_path / "cache" / "contents").iterdir()).write_text("{cut o")
    assert remembered(file, "size", find) == 5


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("HASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hass_core.store.content.SETTLED_SECONDS", 1e9)
    (tmp_path / "file").write_bytes(b"12345")
    content_of(tmp_path / "file")
    assert not (tmp_path / "cache").exists()
