"""Which target it is: digests of everything about a target that can decide a result of the pipeline.

    weights     every tensor of the stored files by its exact values, whatever file, type or device holds it
    config      the configuration as far as it decides what is computed: sizes, rope, norms, activation, windows …
    ends        the tokens that end an answer, from the generation settings, the model and the tokenizer
    tokenizer   vocabulary, merges, added tokens, normaliser, special tokens
    template    the chat template

Names, paths, versions and the type that weights are loaded in are no part of it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hass_core.errors import TargetError
from hass_core.store import digest_of
from hass_core.store.content import remembered

HASHING_THREADS = 8
INERT_CONFIG = {  # fields of a configuration that no computation of the pipeline depends on
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map"),
    *("id2label", "label2id", "problem_type", "num_labels"),  # of classifiers
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("initializer_range", "initializer_factor", "chunk_size_feed_forward", "pretraining_tp"),
    *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "attention_probs_dropout_prob"),
    *("hidden_dropout_prob", "resid_dropout", "embedding_dropout", "classifier_dropout"),  # in training alone
    *("router_aux_loss_coef", "router_z_loss_coef"),
    "pad_token_id",  # rows are padded behind what attention sees
    "eos_token_id",  # see `ends`
}
INERT_TOKENIZER = {  # settings of one call, or of nothing that is asked of a tokenizer here
    *("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "chat_template"),
    *("transformers_version", "model_max_length", "padding_side", "truncation_side", "model_input_names", "backend"),
    *("is_local", "local_files_only", "processor_class", "auto_map", "tokenizer_class", "use_fast", "files_loaded"),
    *("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"),
}


@dataclass(frozen=True)
class TargetIdentity:
    """Digests of a target's parts, 16 hex digits each; see the module's docstring."""

    weights: str
    config: str
    ends: str
    tokenizer: str
    template: str

    @property
    def digest(self) -> str:
        """One over all parts."""
        return digest_of(asdict(self))

    def parts(self, *names: str) -> dict[str, str]:
        """The named parts, for the key of a stage that depends on no others; without names all."""
        return {name: digest for name, digest in asdict(self).items() if name in names or not names}

    def differing(self, recorded: Mapping[str, Any], but: Sequence[str] = ()) -> list[str]:
        """The parts in which a record (see `parts`) tells of another target; what it does not tell is not compared."""
        return [n for n, ours in self.parts().items() if n not in but and recorded.get(n, ours) != ours]


def identify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], weights: str | None = None
) -> TargetIdentity:
    """The identity of a loaded target; `weights` is the digest of its files, else the model's own tensors are read."""
    return identity_of(model.config, tokenizer, ends, weights or weights_of_model(model))


def identity_of(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], weights: str
) -> TargetIdentity:
    """The identity of a target whose weights have the digest `weights`."""
    return TargetIdentity(
        weights=weights,
        config=config_digest(config),
        ends=digest_of(sorted(ends)),
        tokenizer=tokenizer_digest(tokenizer),
        template=template_digest(str(tokenizer.chat_template)),
    )


def end_tokens_of(*sources: Any) -> tuple[int, ...]:
    """All tokens that end an answer, of a model's generation settings, its configuration and its tokenizer.

    Raises TargetError for what is no token id.
    """
    found: list[int] = []
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        found += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if wrong := [value for value in found if type(value) is not int]:  # true is no token, nor is its text
        raise TargetError(
            f"the target's eos_token_id holds {wrong[0]!r}, which is no token id; mend its config.json or "
            "generation_config.json"
        )
    return tuple(sorted(set(found)))


def template_digest(template: str) -> str:
    """Of a chat template's text."""
    return hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest()[:16]


def recorded_template(record: Mapping[str, Any]) -> str | None:
    """Digest of the template that a draft's record (see `Target.record`) tells; None where it tells none."""
    return record.get("target_identity", {}).get("template") or record.get("template_hash")


def config_digest(config: PretrainedConfig) -> str:
    """Of all fields that can decide what is computed, defaults filled in. A field that is None or off counts as absent:
    a new version of transformers adds such ones."""
    return digest_of(_deciding(config.to_dict()))


def _deciding(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {str(k): _deciding(v) for k, v in value.items() if k not in INERT_CONFIG}
        return {k: v for k, v in kept.items() if v is not None and v is not False}
    return [_deciding(item) for item in value] if isinstance(value, (list, tuple)) else value


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which ids a text becomes, which text ids become, and which tokens are special."""
    left_out = {*INERT_TOKENIZER, *tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    settings = {k: v for k, v in tokenizer.init_kwargs.items() if k not in left_out}
    content = {
        "engine": _engine_content(tokenizer),
        "added": {i: repr(token) for i, token in sorted(tokenizer.added_tokens_decoder.items())},
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "settings": {k: repr(v) for k, v in settings.items() if v is not None and v is not False},
    }
    return digest_of(content)


def _engine_content(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its vocabulary, and the file that holds the rest
        file = getattr(tokenizer, "vocab_file", None)
        model = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else None
        return {"vocabulary": tokenizer.get_vocab(), "model": model}
    content = json.loads(backend.to_str())
    return {name: part for name, part in content.items() if name not in ("truncation", "padding")}  # of one call


def tensors_of_files(files: Iterable[Path]) -> dict[str, str]:
    """Digests of all tensors in safetensors or PyTorch files, by name, however they are divided among files."""
    tensors: dict[str, str] = {}
    for file in files:
        tensors |= remembered(file, "tensors", _tensors_of)
    return tensors


def weights_of_model(model: PreTrainedModel) -> str:
    """One digest over the tensors of a model in memory; those that it shares are counted once."""
    seen: set[int] = set()
    named: list[tuple[str, Tensor]] = []
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            named.append((name, tensor))
    return digest_of(_digests(named))


def _tensors_of(file: Path) -> dict[str, str]:
    if file.suffix != ".safetensors":
        return _digests(torch.load(file, map_location="cpu", weights_only=True, mmap=True).items())
    with safe_open(file, framework="pt") as stored:
        return _digests((name, stored.get_tensor(name)) for name in stored.keys())  # noqa: SIM118 - no dict


def _digests(named: Iterable[tuple[str, Any]]) -> dict[str, str]:
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        running = [(name, threads.submit(tensor_digest, tensor)) for name, tensor in _only_tensors(named)]
        return {name: digest.result() for name, digest in running}


def _only_tensors(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in named if isinstance(value, Tensor))


def tensor_digest(tensor: Tensor) -> str:
    """32 hex digits of a tensor's shape and exact values: the same numbers in bfloat16 and in float32 give the same."""
    tensor = tensor.detach().to("cpu").contiguous()
    kind, data = _canonical(tensor)
    digest = hashlib.sha256(f"{kind}{tuple(tensor.shape)}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _canonical(tensor: Tensor) -> tuple[str, Tensor]:
    """Floating-point numbers in the shortest of bfloat16 and float32 that holds them all exactly."""
    if tensor.dtype == torch.bfloat16:
        return "bfloat16", tensor
    if tensor.dtype not in (torch.float16, torch.float32):
        return str(tensor.dtype), tensor
    exact = tensor.float()
    short = exact.to(torch.bfloat16)
    return ("bfloat16", short) if torch.equal(short.float(), exact) else ("float32", exact)


def sampled_fingerprint(model: PreTrainedModel) -> str:
    """What drafts trained before identities were kept name their target by: 64 values of each parameter."""
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
