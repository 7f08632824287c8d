"""What a machine lacks for a run is told in one sentence, before the run begins."""

import json
import os

import pytest

from hass_core.config import load_config
from hass_core.errors import StoreError, TargetError
from hass_core.forecast import ready
from hass_core.forecast.ready import announcement, check_ready
from tests.conftest import byte_tokenizer, tiny_llama


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A hub's cache that holds nothing, and no token."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: os.environ.get("HF_TOKEN"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(ready, "_host_memory", lambda: 1e12)


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Makes a driver that tells of so many H100s."""

    def put(count: int) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text("#!/bin/sh\n" + "echo '81559, NVIDIA H100 80GB HBM3'\n" * count)
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)

    return put


def test_a_gated_target_needs_a_token_or_to_be_here(tmp_path, monkeypatch):
    config = load_config("llama-3.1-8b", ['features.encoding="none"', f"store={tmp_path}"])
    with pytest.raises(TargetError, match=r"Llama-3\.1-8B-Instruct is gated: accept its terms .* and set HF_TOKEN"):
        check_ready(config)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    check_ready(config)


def test_a_disk_without_room_is_refused_but_not_for_features_that_are_there(tmp_path, monkeypatch):
    config = load_config("qwen2.5-7b", [f"store={tmp_path}/new/store"])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: _Free(150e9))
    with pytest.raises(StoreError, match=r'will write about 16\d GB into .*, where 150 GB are free; .*"int8"'):
        check_ready(config)
    stored = tmp_path / "new" / "store" / "features" / "x" / "part-0.parquet"
    stored.parent.mkdir(parents=True)
    with stored.open("wb") as file:
        file.truncate(30_000_000_000)  # sparse
    check_ready(config)


class _Free:
    def __init__(self, free: float):
        self.free = free


def test_what_is_larger_than_the_gpu_is_refused_with_the_way_out(gpus, tmp_path):
    def wanted(preset: str, *changes: str):
        return load_config(preset, [f"store={tmp_path}", 'features.encoding="none"', *changes])

    gpus(2)
    check_ready(wanted("qwen3-32b"))
    check_ready(wanted("llama-3.3-70b", "target.source=Qwen/Qwen3-32B"))
    with pytest.raises(TargetError, match=r'has 66 GB of weights, this GPU 60 GB .* target\.device = "balanced"'):
        ready.check_memory(wanted("qwen3-32b", "target.device=auto"), 66e9, 0, [60e9])
    packs = ("training.packs_per_step=32", "training.packs_per_micro_batch=32", "training.tokens_per_pack=4096")
    with pytest.raises(TargetError, match=r"training takes 1\d\d GB of GPU memory, .* training\.packs_per_micro_batch"):
        check_ready(wanted("qwen3-32b", *packs))


def test_a_machine_without_gpu_and_memory_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(ready, "_host_memory", lambda: 16e9)
    with pytest.raises(TargetError, match="has 29 GB of weights, this machine 16 GB of memory and no GPU"):
        check_ready(load_config("phi-4", [f"store={tmp_path}"]))


def test_the_announcement_tells_the_time_on_the_gpus_that_are_there(gpus):
    assert not any(line.startswith("about") for line in announcement(load_config("llama-3.1-8b")))
    gpus(8)
    assert any(
        line.startswith("about ") and line.endswith(" minutes on 8 × H100")
        for line in announcement(load_config("llama-3.1-8b"))
    )


def test_a_machine_without_gpu_is_told_the_time_where_it_was_measured(gpus):
    (told,) = [line for line in announcement(load_config("smollm2-cpu")) if line.startswith("about ")]
    minutes, unit = told.split()[1:3]
    assert (12 <= int(minutes) <= 18, unit) == (True, "minutes")  # docs/results.md: 894 s
    assert "2 CPU cores" in told
    longer = load_config("smollm2-cpu", ["training.passes=3", "prompts.max_prompts=none"])
    (told,) = [line for line in announcement(longer) if line.startswith("about ")]
    assert int(told.split()[1]) > 30
    (told,) = [line for line in announcement(load_config("qwen3-8b")) if line.startswith("no time")]
    assert "only SmolLM2-135M-Instruct was measured" in told
    gpus(1)
    assert not any("CPU" in line for line in announcement(load_config("smollm2-cpu")))


def test_a_folder_that_lacks_words_or_weights_is_refused_before_anything_starts(tmp_path):
    folder = tmp_path / "mine"
    tiny_llama().save_pretrained(folder)
    config = load_config("smollm2-cpu", [f"target.source={folder}", f"store={tmp_path}/store"])
    with pytest.raises(TargetError, match="mine' has no tokenizer; put its tokenizer"):
        check_ready(config)
    byte_tokenizer().save_pretrained(folder)
    check_ready(config)
    (folder / "model.safetensors").unlink()
    with pytest.raises(TargetError, match=r"mine' has no weights; put its \.safetensors files"):
        check_ready(config)


def test_a_small_disk_is_told_in_megabytes(tmp_path, monkeypatch):
    config = load_config("smollm2-cpu", [f"store={tmp_path}"])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: _Free(12_300_000))
    with pytest.raises(StoreError, match=r"will write about \d\d\d MB into .*, where 12 MB are free"):
        check_ready(config)


def test_a_target_of_unknown_sizes_is_let_through(tmp_path):
    config = load_config("smollm2-cpu", ["target.source=someone/model", f"store={tmp_path}"])
    check_ready(config)
    assert announcement(config)[0].startswith("no forecast: the sizes of the target 'someone/model' are not known here")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"hidden_size": 8}))
    mine = load_config("smollm2-cpu", [f"target.source={tmp_path}/mine"])
    assert "has no num_attention_heads: only dense decoders" in announcement(mine)[0]
