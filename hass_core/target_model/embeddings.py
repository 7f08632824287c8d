"""A target's embedding and head without its layers: all of it that training on stored features needs.

Of a checkpoint in several files only those that hold one of the two are opened. They do not show which target it is:
the features are stored with a record of the target they were made with (`MadeWith`), which has the digests of both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from hass_core.config import TargetConfig
from hass_core.errors import TargetError
from hass_core.target_model.files import resolve_source, tensor_files
from hass_core.target_model.identity import TargetIdentity, end_tokens_of, identity_of, tensor_digest
from hass_core.target_model.known import KnownTarget
from hass_core.target_model.loader import (
    choose_device,
    choose_dtype,
    failures_named,
    load_options,
    load_words,
    origin_of,
)
from hass_core.target_model.soundness import check_tokenizer
from hass_core.target_model.source import check_source, target_name


class MadeWith(BaseModel, frozen=True):
    """Which target something was made with: its identity's parts, and its embedding and head by their content in
    bfloat16, which is the same whatever type they were loaded in."""

    identity: dict[str, str]
    embedding: str
    head: str

    @classmethod
    def of(cls, target: KnownTarget) -> "MadeWith":
        """Of a loaded target."""
        embedding = tensor_digest(target.embedding.to(torch.bfloat16))
        tied = target.head.data_ptr() == target.embedding.data_ptr()
        head = embedding if tied else tensor_digest(target.head.to(torch.bfloat16))
        return cls(identity=target.identity.parts(), embedding=embedding, head=head)


@dataclass(frozen=True)
class TargetEmbeddings(KnownTarget):
    """A target without its layers. Fields as `Target` has them."""

    name: str
    folder: str
    tokenizer: PreTrainedTokenizerBase
    identity: TargetIdentity
    stored_config: PretrainedConfig
    tensors: tuple[Tensor, Tensor]
    end_tokens: tuple[int, ...]
    origin: Mapping[str, str]

    @property
    def config(self) -> PretrainedConfig:
        return self.stored_config

    @property
    def embedding(self) -> Tensor:
        """Token embeddings [V, H]."""
        return self.tensors[0]

    @property
    def head(self) -> Tensor:
        """Output projection [V, H]; the embedding itself where the target ties them."""
        return self.tensors[1]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        return self.end_tokens

    def sampled_fingerprint(self) -> None:
        """Unknown without the layers: a draft that tells no more of its target is taken for another's."""
        return None


def load_embeddings(config: TargetConfig, made_with: MadeWith) -> TargetEmbeddings:
    """Embedding and head of the target that the features were `made_with`.

    Raises TargetError where the settings name another target, or one whose files are not safetensors.
    """
    source = config.source
    check_source(source)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    options = load_options(config)
    with failures_named(source):
        folder = resolve_source(source)
        stored, tokenizer = load_words(folder, source, options)
        tokens = end_tokens_of(_generation_config(folder, stored, config.revision), stored, tokenizer)
        identity = identity_of(stored, tokenizer, tokens, made_with.identity.get("weights", ""))
        tensors = _read(folder, stored, config.trust_remote_code, device, dtype)
        check_tokenizer(tokenizer, len(tensors[0]), source)
    origin = origin_of(config)
    known = TargetEmbeddings(target_name(source), folder, tokenizer, identity, stored, tensors, tokens, origin)
    found = MadeWith.of(known)
    differing = [name for name, value in found if name != "identity" and value != getattr(made_with, name)]
    differing += identity.differing(made_with.identity)
    if differing:
        raise TargetError(
            f"the features were made with another target than {source}: its {', '.join(differing)} differ; name that "
            "target, or extract the features again"
        )
    return known


def _generation_config(folder: str, config: PretrainedConfig, revision: str | None) -> GenerationConfig:
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        return GenerationConfig.from_pretrained(folder, **options)
    except OSError:  # it has none: the model makes one of its configuration
        return GenerationConfig.from_model_config(config)


def _read(
    folder: str, config: PretrainedConfig, trusted: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Embedding and head, one after the other: no more than one of them is in memory twice."""
    wanted = list(_names(config, trusted))
    files = tensor_files(folder, config)
    read: list[Tensor] = []
    for name, shape in wanted:
        stored = _stored_name(name, files, folder)
        with safe_open(files[stored], framework="pt") as file:
            tensor = file.get_tensor(stored)
        if tensor.shape != shape:
            raise TargetError(f"{folder}: {stored} is {list(tensor.shape)}, its configuration says {list(shape)}")
        read.append(tensor.to(device, dtype))
    return read[0], read[-1]


def _names(config: PretrainedConfig, trusted: bool) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of the embedding and, where it is another tensor, of the head, from a model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    head = model.get_output_embeddings()
    if head is None:
        raise TargetError(f"{config.model_type} has no output projection; give a causal language model")
    model.tie_weights()
    for module in (model.get_input_embeddings(), head)[
        : 1 if head.weight is model.get_input_embeddings().weight else 2
    ]:
        yield next(f"{name}.weight" for name, each in model.named_modules() if each is module), module.weight.shape


def _stored_name(name: str, files: dict[str, Path], folder: str) -> str:
    """The name under which a file holds it: the model's own, or one that differs in its leading parts."""
    if name in files:
        return name
    last = ".".join(name.split(".")[-2:])
    alike = [stored for stored in files if stored == last or stored.endswith(f".{last}")]
    if len(alike) != 1:
        raise TargetError(f"{folder} holds no tensor {name}; fetch it again, or train with the whole target")
    return alike[0]
