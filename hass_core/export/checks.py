"""A strict check of a draft folder against its target, an engine, and the draft it was exported from.

Engines load wrong drafts without a word: a missing tensor keeps its random start, a bias is dropped, a wrong rope
halves acceptance. Each function below looks for one kind of fault and yields findings that say what is wrong, what
the engine would do, and how to mend it. At the end the folder is read as the engine reads it, and what that draws must
be what the draft draws.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hass_core.draft_model.accounting import (
    EMBEDDING,
    PREFIX,
    StoredDraft,
    account,
    refuse_other_models,
)
from hass_core.draft_model.architecture import FC_BIAS, O_BIAS, QKV_BIASES, DraftArchitecture, contradicting_ropes
from hass_core.draft_model.checkpoint import origin_difference
from hass_core.draft_model.eagle3 import Eagle3Architecture, is_eagle3
from hass_core.draft_model.engines import Engine, unheld
from hass_core.draft_model.files import CONFIG, read_config, read_tensors, same_values
from hass_core.draft_model.identity import draft_identity
from hass_core.draft_model.record import check_record
from hass_core.draft_model.target import DraftedTarget
from hass_core.errors import DraftMismatch
from hass_core.export.eagle3 import CLASS as EAGLE3_CLASS
from hass_core.export.eagle3 import eagle3_findings
from hass_core.export.eagle3_reader import read_eagle3_as
from hass_core.export.findings import EXPORT_AGAIN, Finding
from hass_core.export.folders import EXPORTED
from hass_core.export.parity import eagle3_difference, feature_difference
from hass_core.export.readers import EngineRefuses, read_as

LARGEST_DIFFERENCE = 1e-3  # of the features, relative, by weights in the export's type
NOT_COMPUTED = {"max_position_embeddings", "bos_token_id", "eos_token_id", "target_model_type"}


class ServedTarget(DraftedTarget, Protocol):
    """What an export needs to know of its target: see `Target`."""

    @property
    def context_tokens(self) -> int: ...


def check_draft(folder: Path, target: ServedTarget, engine: Engine, source: StoredDraft | None = None) -> list[Finding]:
    """All faults of a draft folder; empty when it will serve.

    With `source`, the draft that was exported, every tensor and setting is compared with it, and so are the features
    that the engine will draw; without it, those that this project draws from the same folder.
    Raises CorruptFile when the folder cannot be read at all, DraftMismatch when it holds another kind of model.
    """
    config, stored = read_config(folder), read_tensors(folder)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    refuse_other_models(folder, config, tensors)
    check_record(config)
    if is_eagle3(config, tensors):
        draft, built = Eagle3Architecture.from_config_json(config, tensors), EAGLE3_CLASS
        of_layout = [*eagle3_findings(config, tensors, engine, target)]
    else:
        draft, built = DraftArchitecture.from_config_json(config, tensors), engine.architecture
        of_layout = [
            *_names(tensors, draft, engine),
            *_shapes(tensors, draft, config),
            *_fc_bias(tensors, config, engine),
            *_attention_biases(tensors, config, engine),
        ]
    findings = [
        *_origin(config.get("hass") or {}, target),
        *_prefix(stored, engine),
        *_values(tensors),
        *_ropes(config),
        *of_layout,
        *_unheld(draft, engine),
        *_embedding(tensors, config, engine, target.embedding),
        *_classes(config, engine, built),
        *_sizes(draft, target),
        *_context(config, target),
    ]
    own = _accounted(folder, config, stored, target)
    if isinstance(own, Finding):
        return findings or [own]
    findings += _changed(own)
    if source:
        findings += _copied(own, source, target.embedding.dtype)
    return [*findings, *_features(config, stored, engine, source or own, target)]


def _origin(trained: dict[str, Any], target: DraftedTarget) -> Iterator[Finding]:
    if difference := origin_difference(trained, target):
        yield Finding(
            "target",
            f"the draft {difference}",
            "it loads, and few of its guesses are accepted",
            "serve it with the target it was trained for (--target), or train a draft for this one",
        )


def _prefix(stored: dict[str, Tensor], engine: Engine) -> Iterator[Finding]:
    if prefixed := sorted(name for name in stored if name.startswith(PREFIX)):
        yield Finding(
            "prefix",
            f"{len(prefixed)} tensors carry the prefix `model.` ({prefixed[0]} …)",
            f"{engine.title} adds that prefix itself and finds none of them",
            "strip `model.` from the names, or " + EXPORT_AGAIN,
        )


def _names(tensors: dict[str, Tensor], draft: DraftArchitecture, engine: Engine) -> Iterator[Finding]:
    names = tensors.keys()
    for name in sorted(draft.tensors().keys() - names):
        yield Finding(
            "missing tensor",
            f"{name} is missing",
            f"{engine.title} starts with uninitialised values for it and says nothing",
            EXPORT_AGAIN,
        )
    for name in sorted(names - draft.tensors().keys() - {FC_BIAS, EMBEDDING}):
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


def _shapes(tensors: dict[str, Tensor], draft: DraftArchitecture, config: dict[str, Any]) -> Iterator[Finding]:
    optional = {FC_BIAS: (draft.hidden_size,), EMBEDDING: (draft.vocab_size, draft.hidden_size)}
    for name, shape in (draft.tensors() | optional).items():
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


def _ropes(config: dict[str, Any]) -> Iterator[Finding]:
    if contradiction := contradicting_ropes(config):
        yield Finding(
            "rope",
            f"config.json tells two rotary embeddings: {contradiction}",
            "engines read one or the other, and few guesses are accepted with the wrong one",
            "keep the one that the draft was trained with, or " + EXPORT_AGAIN,
        )


def _fc_bias(tensors: dict[str, Tensor], config: dict[str, Any], engine: Engine) -> Iterator[Finding]:
    bias = tensors.get(FC_BIAS)
    if engine.fc_bias == "ignored" and bias is not None and bool((bias != 0).any()):
        yield Finding(
            FC_BIAS,
            "fc.bias is not zero",
            f"{engine.title} builds fc without a bias and ignores this one silently",
            "`hass import --fold-bias` moves it into the draft's own embedding where that is exact",
        )
    if engine.fc_bias == "required" and bias is None:
        yield Finding(
            FC_BIAS,
            "fc.bias is missing",
            f"{engine.title} always has one and keeps its random start values",
            "add a zero fc.bias, or " + EXPORT_AGAIN,
        )
    if engine.fc_bias == "by_config" and (bias is not None) != config.get("bias", True):
        yield Finding(
            FC_BIAS,
            f'fc.bias is {"present" if bias is not None else "missing"} but "bias" in config.json is '
            f"{config.get('bias', 'absent, which means true')}",
            f"{engine.title} loads strictly and fails",
            "make both agree, or " + EXPORT_AGAIN,
        )


def _attention_biases(tensors: dict[str, Tensor], config: dict[str, Any], engine: Engine) -> Iterator[Finding]:
    """Biases of q/k/v and of the output: those that config.json makes the engine build are those in the file."""
    output = engine.o_bias and bool(config.get("attention_bias") or config.get("bias"))
    rest = bool(config.get("qkv_bias", output)) if engine.qkv_bias == "qkv_bias" else output
    for names, built in ((QKV_BIASES, rest), ((O_BIAS,), output)):
        missing = [name for name in names if name not in tensors]
        present = [name for name in names if name in tensors and bool(tensors[name].any())]
        if built and missing:
            yield Finding(
                "bias",
                f'"bias", "attention_bias" or "qkv_bias" in config.json asks for {", ".join(missing)}',
                f"{engine.title} builds them, the file lacks them: nothing is accepted, without an error",
                f'set "bias" and "attention_bias" to false, or {EXPORT_AGAIN}',
            )
        if present and not built:
            yield Finding(
                "bias",
                f"{', '.join(present)} are in the file, and config.json does not ask {engine.title} for them",
                "they are dropped without a word and few of its guesses are accepted",
                f"set {_setting_of(engine, names)} to true, or {EXPORT_AGAIN}",
            )


def _setting_of(engine: Engine, names: tuple[str, ...]) -> str:
    return f'"{engine.qkv_bias if names is QKV_BIASES else "attention_bias"}"'


def _unheld(draft: DraftArchitecture, engine: Engine) -> Iterator[Finding]:
    for reason in unheld(engine, draft):
        yield Finding(
            "not held",
            f"{engine.title} has no place for {reason}",
            "it refuses the draft or draws other features from it",
            'train a draft with draft.family = "llama", or serve with another engine',
        )


def _embedding(tensors: dict[str, Tensor], config: dict[str, Any], engine: Engine, target: Tensor) -> Iterator[Finding]:
    own = tensors.get(EMBEDDING)
    if engine.embedding == "required" and own is None:
        yield Finding(
            "embedding", "embed_tokens.weight is missing", f"{engine.title} loads strictly and fails", EXPORT_AGAIN
        )
    if own is None or own.shape != target.shape or same_values(own, target):
        return
    trained_so = (config.get("hass") or {}).get("own_embedding") or (config.get("hass") or {}).get("folded_bias")
    if trained_so and engine.embedding != "replaced":
        return
    yield Finding(
        "embedding",
        "embed_tokens.weight differs from the target's embedding",
        f"{engine.title} {'replaces it by' if engine.embedding == 'replaced' else 'keeps it instead of'} the target's",
        "leave it out, or export for the target this draft was trained with",
    )


def _classes(config: dict[str, Any], engine: Engine, built: str) -> Iterator[Finding]:
    wanted = {
        "architectures": [built],
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
                f'set "{field}" to {value!r}, or export the draft again with `hass export --engine {engine.name}`',
            )


def _sizes(draft: DraftArchitecture, target: ServedTarget) -> Iterator[Finding]:
    rows, hidden = target.embedding.shape
    for field, theirs in (("hidden_size", hidden), ("vocab_size", rows)):
        if getattr(draft, field) != theirs:
            yield Finding(
                field,
                f"the draft's {field} is {getattr(draft, field)}, the target's is {theirs}",
                "features or tokens of the target do not fit the draft",
                "use the target this draft was trained with",
            )


def _context(config: dict[str, Any], target: ServedTarget) -> Iterator[Finding]:
    longest, context = config.get("max_position_embeddings") or 2048, target.context_tokens
    if longest < context < 2**31:
        yield Finding(
            "max_position_embeddings",
            f"the draft stops at {longest} tokens, the target at {context}",
            "longer requests crash or lose acceptance",
            f'set "max_position_embeddings" to {context}',
        )


def _accounted(
    folder: Path, config: dict[str, Any], stored: dict[str, Tensor], target: ServedTarget
) -> StoredDraft | Finding:
    try:
        return account(folder, config, stored, target)
    except DraftMismatch as error:
        return Finding("tensors", str(error), "it is not the draft that was trained", EXPORT_AGAIN)


def _changed(own: StoredDraft) -> Iterator[Finding]:
    recorded = own.info.get(EXPORTED)
    if recorded and recorded != (found := draft_identity(own)):
        yield Finding(
            "changed",
            f"weights or config.json are not those of the export (its record is {recorded}, they give {found})",
            "the draft computes something else than it was trained to",
            EXPORT_AGAIN,
        )


def _copied(own: StoredDraft, source: StoredDraft, dtype: torch.dtype) -> Iterator[Finding]:
    for name, tensor in source.weights.items():
        if name not in own.weights or not torch.equal(own.weights[name].to(dtype), tensor.to(dtype)):
            yield Finding(
                "other values",
                f"{name} {'is not that' if name in own.weights else 'is missing; it is one'} of the draft exported",
                "the draft computes something else than it was trained to",
                EXPORT_AGAIN,
            )
    for name in sorted(own.weights.keys() - source.weights.keys()):
        yield Finding("invented", f"{name} is no tensor of the draft exported", "it changes the features", EXPORT_AGAIN)
    if not _same_tokens(own.vocabulary, source.vocabulary) and source.architecture.own_head:
        yield Finding("d2t", "the tokens drafted are others", "every guess is another token", EXPORT_AGAIN)
    ours, theirs = (draft.architecture.model_dump(exclude=NOT_COMPUTED) for draft in (own, source))
    for field in (name for name in theirs if ours.get(name) != theirs[name]):
        yield Finding(
            "rope" if field == "rope_parameters" else field,
            f"{field} is {ours.get(field)!r}, the draft was trained with {theirs[field]!r}",
            "the draft computes something else than it was trained to",
            f"write the draft's own {field}, or {EXPORT_AGAIN}",
        )


def _same_tokens(ours: Tensor | None, theirs: Tensor | None) -> bool:
    return ours is theirs if ours is None or theirs is None else torch.equal(ours, theirs)


def _features(
    config: dict[str, Any], stored: dict[str, Tensor], engine: Engine, source: StoredDraft, target: ServedTarget
) -> Iterator[Finding]:
    try:
        if source.architecture.own_head:
            read = read_eagle3_as(engine.name, config, stored, target.embedding, target.head, target.num_layers)
            difference = eagle3_difference(read, source, target)
        else:
            reading = read_as(engine.name, config, stored, target.embedding)
            difference = feature_difference(reading, source, target)
    except EngineRefuses as refusal:
        yield Finding("loading", f"{engine.title} does not load it: {refusal}", "it stops at its start", EXPORT_AGAIN)
        return
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = f"{type(error).__name__}: {' '.join(map(str, error.args)).splitlines()[0]}"
        yield Finding("loading", f"{engine.title} cannot make sense of {CONFIG} ({what})", "it stops", EXPORT_AGAIN)
        return
    if not difference <= LARGEST_DIFFERENCE:  # NaN too
        yield Finding(
            "features",
            f"read as {engine.title} reads it, the folder gives other features than the draft "
            f"(relative difference {difference:.1e}, limit {LARGEST_DIFFERENCE:.0e})",
            "few of its guesses are accepted",
            EXPORT_AGAIN,
        )
