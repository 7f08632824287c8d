"""A strict check of a draft folder against a target and an engine.

Engines load wrong drafts without a word: a missing tensor keeps its random start, a bias is dropped, a wrong rope
halves acceptance. Each function below looks for one kind of fault and yields findings that say what is wrong, what
the engine would do, and how to mend it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hass_core.errors import BadInput
from hass_core.export.engines import Engine
from hass_core.export.layout import Layout, read_config, read_tensors
from hass_core.target_model.loader import Target


@dataclass(frozen=True)
class Finding:
    """One fault of a draft folder."""

    check: str
    what: str
    consequence: str
    mend: str

    def __str__(self) -> str:
        return f"{self.check}: {self.what}. {self.consequence}. To mend: {self.mend}."


EXPORT_AGAIN = "export the draft again with `hass export`"


def check_draft(
    folder: Path,
    target: PretrainedConfig,
    engine: Engine,
    embedding: Tensor | None = None,
    origin: Target | None = None,
) -> list[Finding]:
    """All faults of a draft folder; empty when it will serve.

    `target` is the target's Hugging Face configuration; its token `embedding` [V, H], when given, is compared too,
    and with the target itself, `origin`, what the draft records of the one that it was trained for.
    Raises BadInput when the folder cannot be read at all or holds another kind of model.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    if not {"fc.weight", "model.fc.weight"} & tensors.keys():
        raise BadInput(f"{folder} holds no draft: it has no fc.weight. Name a draft's folder; the target is --target")
    layout = Layout.from_config(config)
    text = target.get_text_config()
    return [
        *_origin(config.get("hass", {}), origin),
        *_names(tensors, layout, engine),
        *_shapes(tensors, layout),
        *_values(tensors),
        *_bias(tensors, config, engine),
        *_embedding(tensors, config, engine, embedding),
        *_classes(config, engine),
        *_sizes(config, layout, text),
        *_positions(config, text),
    ]


def _origin(record: dict[str, Any], target: Target | None) -> Iterator[Finding]:
    if target and (differing := target.differing(record)):  # imported EAGLE drafts tell nothing
        yield Finding(
            "target",
            f"the draft was trained for {record.get('target', 'another target')}, which differs from {target.name} in "
            f"its {' and '.join(differing)}",
            "it loads, and few of its guesses are accepted",
            "serve it with the target it was trained for (--target), or train a draft for this one",
        )


def _names(tensors: dict[str, Tensor], layout: Layout, engine: Engine) -> Iterator[Finding]:
    if prefixed := sorted(name for name in tensors if name.startswith("model.")):
        yield Finding(
            "prefix",
            f"{len(prefixed)} tensors carry the prefix `model.` ({prefixed[0]} …)",
            f"{engine.title} adds that prefix itself and finds none of them",
            "strip `model.` from the names, or " + EXPORT_AGAIN,
        )
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for name in sorted(layout.trained().keys() - tensors.keys()):
        yield Finding(
            "missing tensor",
            f"{name} is missing",
            f"{engine.title} starts with uninitialised values for it and says nothing",
            EXPORT_AGAIN,
        )
    for name in sorted(tensors.keys() - layout.trained().keys() - layout.optional().keys()):
        yield Finding(
            _extra_kind(name), f"{name} does not belong to a draft", _extra_consequence(name, engine), f"remove {name}"
        )


def _extra_kind(name: str) -> str:
    if name == "lm_head.weight":
        return "lm_head"
    return "norm" if "norm" in name else "extra tensor"


def _extra_consequence(name: str, engine: Engine) -> str:
    if name == "lm_head.weight":
        reason = "the target's head is used"
    elif "input_layernorm" in name:
        reason = "layer 0 has no input norm"
    elif name == "norm.weight":
        reason = "a draft has no final norm"
    else:
        reason = "it has no place for it"
    outcome = "refuses to load it" if engine.rejects_extra else "drops it with at most a warning"
    return f"{engine.title} {outcome}: {reason}"


def _shapes(tensors: dict[str, Tensor], layout: Layout) -> Iterator[Finding]:
    for name, shape in (layout.trained() | layout.optional()).items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            yield Finding(
                "shape",
                f"{name} is {tuple(tensors[name].shape)}, config.json asks for {shape}",
                "loading fails, or the wrong rows are used",
                "take config.json and weights from the same export",
            )


def _values(tensors: dict[str, Tensor]) -> Iterator[Finding]:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            yield Finding(
                "values",
                f"{name} holds NaN or infinite values",
                "every draft token would be rejected",
                "export the last good checkpoint; training stops before it saves such weights",
            )


def _bias(tensors: dict[str, Tensor], config: dict[str, Any], engine: Engine) -> Iterator[Finding]:
    bias = tensors.get("fc.bias")
    if engine.fc_bias == "ignored" and bias is not None and bool((bias != 0).any()):
        yield Finding(
            "fc.bias",
            "fc.bias is not zero",
            f"{engine.title} builds fc without a bias and ignores this one silently",
            "`hass import --fold-bias` moves it into the draft's own embedding where that is exact",
        )
    if engine.fc_bias == "required" and bias is None:
        yield Finding(
            "fc.bias",
            "fc.bias is missing",
            f"{engine.title} always has one and keeps its random start values",
            "add a zero fc.bias, or " + EXPORT_AGAIN,
        )
    if engine.fc_bias == "by_config" and (bias is not None) != config.get("bias", True):
        yield Finding(
            "fc.bias",
            f'fc.bias is {"present" if bias is not None else "missing"} but "bias" in config.json is '
            f"{config.get('bias', 'absent, which means true')}",
            f"{engine.title} loads strictly and fails",
            "make both agree, or " + EXPORT_AGAIN,
        )
    if engine.fc_bias != "by_config" and (config.get("bias") or config.get("attention_bias")):
        yield Finding(
            "bias",
            '"bias" or "attention_bias" is true in config.json',
            f"{engine.title} reads it as attention biases, which the file lacks: nothing is accepted, without an error",
            'set "bias" to false and remove "attention_bias"',
        )


def _embedding(
    tensors: dict[str, Tensor], config: dict[str, Any], engine: Engine, target: Tensor | None
) -> Iterator[Finding]:
    own = tensors.get("embed_tokens.weight")
    folded = bool(config.get("hass", {}).get("folded_bias"))
    if engine.embedding == "required" and own is None:
        yield Finding(
            "embedding", "embed_tokens.weight is missing", f"{engine.title} loads strictly and fails", EXPORT_AGAIN
        )
    if own is None or target is None or own.shape != target.shape:
        return
    if torch.equal(own.float(), target.float().to(own.device).to(own.dtype).float()):
        return
    if folded and engine.embedding == "optional":
        return
    yield Finding(
        "embedding",
        "embed_tokens.weight differs from the target's embedding",
        f"{engine.title} {'replaces it by' if engine.embedding == 'replaced' else 'keeps it instead of'} the target's",
        "leave it out, or export for the target this draft was trained with",
    )


def _classes(config: dict[str, Any], engine: Engine) -> Iterator[Finding]:
    wanted = {
        "architectures": [engine.architecture],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
    }
    for field, value in wanted.items():
        if config.get(field) != value:
            yield Finding(
                field,
                f'"{field}" is {config.get(field)!r}, {engine.title} needs {value!r}',
                "another model class or structure is built",
                f'set "{field}" to {value!r}, or export the draft again with `hass export --to {engine.name}`',
            )


def _sizes(config: dict[str, Any], layout: Layout, target: PretrainedConfig) -> Iterator[Finding]:
    for field in ("hidden_size", "vocab_size"):
        if getattr(layout, field) != getattr(target, field):
            yield Finding(
                field,
                f"the draft's {field} is {getattr(layout, field)}, the target's is {getattr(target, field)}",
                "features or tokens of the target do not fit the draft",
                "use the target this draft was trained with",
            )
    for field in ("rms_norm_eps", "hidden_act"):
        ours, theirs = config.get(field), getattr(target, field, None)
        if theirs is not None and ours != theirs and not _close(ours, theirs):
            yield Finding(
                field,
                f'"{field}" is {ours!r}, the target has {theirs!r}',
                "the draft computes something else than it was trained to",
                f'set "{field}" to {theirs!r}',
            )


def _positions(config: dict[str, Any], target: PretrainedConfig) -> Iterator[Finding]:
    ours, theirs = rope_of(config), rope_of(target.to_dict())
    if ours != theirs:
        yield Finding(
            "rope",
            f"rotary settings are {ours}, the target has {theirs}",
            "positions differ from training and acceptance falls with length",
            "copy the target's rope settings",
        )
    longest, context = config.get("max_position_embeddings", 2048), target.max_position_embeddings
    if longest < context:
        yield Finding(
            "max_position_embeddings",
            f"the draft stops at {longest} tokens, the target at {context}",
            "longer requests crash or lose acceptance",
            f'set "max_position_embeddings" to {context}',
        )


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in one form, whichever way a config.json writes them (transformers 4 or 5)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0)
    return {"rope_type": kind, "rope_theta": theta, **{k: v for k, v in sorted(rope.items()) if v is not None}}


def _close(ours: Any, theirs: Any) -> bool:
    return isinstance(ours, float) and isinstance(theirs, float) and abs(ours - theirs) <= 1e-3 * abs(theirs)
