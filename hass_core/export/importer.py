"""Bring in an existing EAGLE, EAGLE-2 or HASS checkpoint, as a warm start or for evaluation.

The official trainers always make an fc.bias; vLLM has none. Folding it into the embedding is exact when the embedding
half of fc is invertible: with fc = [We | Wf], We·(e + x) + Wf·f = We·e + Wf·f + b for the x that solves We·x = b.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from hass_core.errors import BadInput, DraftMismatch
from hass_core.export.layout import CONFIG, WEIGHTS, Layout, check_out, read_config, read_tensors

MAX_CONDITION = 1e6  # beyond this, fp32 loses more than half its digits in the solve
MAX_RELATIVE_ERROR = 1e-4


@dataclass(frozen=True)
class Folding:
    """How well a bias went into the embedding."""

    condition: float  # of the embedding half of fc
    relative_error: float  # of the fused output on random inputs, fp32


def import_draft(source: Path, target: PretrainedConfig, out: Path) -> Path:
    """Convert a checkpoint folder (model.safetensors or pytorch_model.bin) to this project's layout; returns `out`.

    Raises BadInput when tensors are missing or `out` holds something else, DraftMismatch when the sizes are not the
    target's.
    """
    check_out(out, source)
    config, tensors = read_config(source), _read_any(source)
    layout = Layout.from_config(config)
    _match(layout, target.get_text_config(), source)
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if missing := sorted(layout.trained().keys() - tensors.keys()):
        raise BadInput(f"{source} is no EAGLE checkpoint: it lacks {', '.join(missing)}")
    kept = {name: tensors[name].contiguous() for name in layout.trained()}
    if "fc.bias" in tensors and bool((tensors["fc.bias"] != 0).any()):
        kept["fc.bias"] = tensors["fc.bias"].contiguous()
    return _save(out, kept, {**config, "bias": "fc.bias" in kept, "architectures": ["LlamaForCausalLM"]})


def fold_bias(folder: Path, embedding: Tensor, out: Path) -> Folding:
    """Move fc.bias into an own copy of the embedding [V, H], for vLLM; writes `out`.

    Raises DraftMismatch with the condition number when that would not be exact, BadInput when there is no bias.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    if "fc.bias" not in tensors:
        raise BadInput(f"{folder} has no fc.bias: there is nothing to fold")
    weight, bias = tensors["fc.weight"].float(), tensors.pop("fc.bias").float()
    hidden = bias.shape[0]
    half = weight[:, :hidden].double()
    condition = float(torch.linalg.cond(half))
    shift = torch.linalg.lstsq(half, bias.double().unsqueeze(1)).solution.squeeze(1)
    error = _folding_error(weight, bias, shift.float(), embedding.float().cpu())
    if not (condition <= MAX_CONDITION and error <= MAX_RELATIVE_ERROR):
        raise DraftMismatch(
            f"fc.bias of {folder} cannot be folded exactly: condition number {condition:.2e} "
            f"(limit {MAX_CONDITION:.0e}), relative error {error:.1e} (limit {MAX_RELATIVE_ERROR:.0e}); "
            "serve this draft with SGLang, which keeps the bias"
        )
    tensors["embed_tokens.weight"] = (embedding.float().cpu() + shift.float()).contiguous()
    made = {**config.get("hass", {}), "folded_bias": True}
    _save(out, tensors, {**config, "bias": False, "hass": made})
    return Folding(condition, error)


def _folding_error(weight: Tensor, bias: Tensor, shift: Tensor, embedding: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(embedding), (256,), generator=generator)
    features = torch.randn(256, weight.shape[0], generator=generator)
    before = torch.cat([embedding[rows], features], -1) @ weight.T + bias
    after = torch.cat([embedding[rows] + shift, features], -1) @ weight.T
    return float((after - before).norm() / before.norm())


def _read_any(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).exists() or not (folder / "pytorch_model.bin").exists():
        return read_tensors(folder)
    try:
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that holds more than tensors, or a broken file
        raise BadInput(f"{folder / 'pytorch_model.bin'} is not a plain file of tensors: {error}") from error


def _match(layout: Layout, target: PretrainedConfig, source: Path) -> None:
    for field in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(layout, field), getattr(target, field)
        if ours != theirs:
            raise DraftMismatch(
                f"{source} was trained for another target: its {field} is {ours}, the target's is {theirs}"
            )


def _save(out: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(out / WEIGHTS), metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return out
