"""The files behind a target: the folder or id to load, and the files of weights that `from_pretrained` takes from it.

A GGUF is dequantised once into a Hugging Face folder of bfloat16 safetensors in the cache; every later load, in
float32 too, sees those same weights.
"""

import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils.hub import cached_file

from hass_core.errors import TargetError
from hass_core.json_files import read_object
from hass_core.store.content import cache_folder, content_of
from hass_core.target_model.hub import check_hub
from hass_core.target_model.source import gguf_of

CONVERSION_VERSION = 2
WEIGHT_FILES = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def resolve_source(source: str) -> str:
    """The folder or id that `from_pretrained` takes; converts a GGUF on first use. Raises TargetError."""
    gguf = gguf_of(source)
    if gguf:
        return str(_converted(gguf))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    check_hub(source)
    return source


def weight_files(folder: str, config: PretrainedConfig) -> list[Path]:
    """The files that `config`'s model was, or would be, loaded from. Raises TargetError where there is none."""
    named = getattr(config, "transformers_weights", None)
    for name in (named,) if named else WEIGHT_FILES:
        if (path := stored_file(folder, name, config)) is None:
            continue
        if not name.endswith(".index.json"):
            _refuse_second_set(Path(folder), name)
            return [path]
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        return [_shard(folder, shard, config) for shard in shards]
    raise TargetError(f"the target {folder} has no weights: neither {' nor '.join(WEIGHT_FILES)} is there")


def tensor_files(folder: str, config: PretrainedConfig) -> dict[str, Path]:
    """The safetensors file of each tensor, by the index; no file is opened but a single one. Raises TargetError."""
    if index := stored_file(folder, WEIGHT_FILES[1], config):
        held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / shard for name, shard in held.items()}
    if (single := stored_file(folder, WEIGHT_FILES[0], config)) is None:
        raise TargetError(f"the target {folder} has no safetensors; convert it, or train with the whole target")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _refuse_second_set(folder: Path, name: str) -> None:
    """Raise TargetError where a folder holds the weights in one file and in shards too: engines differ in which they
    take."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return
    weight_map = read_object(index, TargetError, "it tells in which file each tensor is").get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if any(shard != name and (folder / str(shard)).is_file() for shard in shards):
        raise TargetError(
            f"the target {folder} holds weights in {name} and in the files of {index.name}; remove one set"
        )


def stored_file(folder: str, name: str, config: PretrainedConfig) -> Path | None:
    """The local path of one of a target's files, at the revision that `config` came from; None where it has none."""
    found = cached_file(
        folder,
        name,
        revision=getattr(config, "_commit_hash", None),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _shard(folder: str, name: str, config: PretrainedConfig) -> Path:
    path = stored_file(folder, name, config)
    if path is None:
        raise TargetError(f"the target {folder} lacks the weights {name} that its index names; fetch it again")
    return path


def _converted(gguf: Path) -> Path:
    """The Hugging Face folder of a GGUF's content, made on first use and put in place in one rename."""
    key = f"{content_of(gguf)[:12]}-v{CONVERSION_VERSION}"
    folder = cache_folder() / "targets" / f"{gguf.stem}-{key}"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="converting-", dir=folder.parent))
    try:
        _convert(gguf, scratch)
        try:
            os.replace(scratch, folder)
        except OSError:  # another process was first
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": gguf.name}
    try:  # newer transformers keep GGUF weights packed unless told otherwise
        from transformers import GgufConfig  # pyright: ignore[reportAttributeAccessIssue]

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    with redirect_stderr(io.StringIO()):  # two progress bars of a second each
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config.pop("quantization_config", None)
    config_file.write_text(json.dumps(config, indent=2))
