"""What a target's files hold against what its configuration says of them, where transformers would load it without a
word: numbers of another kind, one tensor in two files, a head beside the embedding that it is tied to.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from hass_core.errors import TargetError

PLAIN = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def check_stored(files: Iterable[Path], name: str) -> None:
    """Raise TargetError for weights that are no plain numbers or stand in two files."""
    file_of: dict[str, Path] = {}
    for file in files:
        for tensor, kind in _kinds_of(file).items():
            if tensor in file_of:
                raise TargetError(
                    f"the target {name} holds {tensor} twice, in {file_of[tensor].name} and {file.name}; fetch it again"
                )
            if kind not in PLAIN and tensor.endswith(".weight"):
                raise TargetError(
                    f"the target {name} stores {tensor} as {kind.removeprefix('torch.')}, and its config.json says "
                    "nothing of a quantisation; give the model it was made from"
                )
            file_of[tensor] = file


def check_tied(tensors: Mapping[str, str], config: PretrainedConfig, name: str) -> None:
    """Raise TargetError where the configuration ties the head to the embedding and the files, told by the digests of
    their tensors, hold another head."""
    text = config.get_text_config()
    heads, embeddings = ([n for n in tensors if n.endswith(suffix)] for suffix in (HEAD, EMBEDDING))
    if not text.tie_word_embeddings or len(heads) != 1 or len(embeddings) != 1:
        return
    if tensors[heads[0]] != tensors[embeddings[0]]:
        raise TargetError(
            f"the target {name} says tie_word_embeddings in its config.json, and its {heads[0]} is not its "
            f"{embeddings[0]}; set tie_word_embeddings to false, or remove the tensor that is left over"
        )


def _kinds_of(file: Path) -> dict[str, str]:
    """The type of each tensor, by its name; nothing but headers is read of safetensors."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118 - no dict
    found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: str(value.dtype) for name, value in found.items() if isinstance(value, Tensor)}
