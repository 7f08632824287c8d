"""Exported folders read back by each engine's own rules, and the features that the engine would draw from them.

Independent of this project's draft model on purpose: names, biases, rotary embedding and arithmetic are written from
the engines' sources (see draft_model/engines.py), so that an export which they read otherwise is found out. What an
engine would leave uninitialised is NaN here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

ATTENTION, MLP = "layers.0.self_attn.", "layers.0.mlp."


class EngineRefuses(Exception):
    """The engine would stop with an error while it loads the folder."""


@dataclass(frozen=True)
class Reading:
    """A draft as an engine has it in memory."""

    weights: Mapping[str, Tensor]  # float32; a missing bias is absent, a missing weight NaN
    embedding: Tensor  # [V, H]
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: Callable[[Tensor], Tensor]
    frequencies: Tensor  # [d / 2], of the rotation, radians a position
    magnitude: float  # factor on cosine and sine

    def features(self, token_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        """Next features [L, H] of rows with next tokens [L] and features [L, H] at `positions` [L]; causal."""
        u = self._linear("fc", torch.cat([self.embedding[token_ids].float(), features], -1))
        y = u + self.attended(u, positions)
        normed = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        normed = normed * self.weights["layers.0.post_attention_layernorm.weight"]
        gated = self.activation(self._linear(MLP + "gate_proj", normed)) * self._linear(MLP + "up_proj", normed)
        return y + self._linear(MLP + "down_proj", gated)

    def attended(self, u: Tensor, positions: Tensor) -> Tensor:
        """What the attention adds [L, H], of rows [L, I] at `positions` [L]; causal."""
        queries = self._rotated(self._heads("q_proj", u, self.heads), positions)
        keys = self._rotated(self._heads("k_proj", u, self.kv_heads), positions)
        values = self._heads("v_proj", u, self.kv_heads)
        group = self.heads // self.kv_heads
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = queries @ keys.transpose(1, 2) / math.sqrt(self.head_dim)
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ values
        return self._linear(ATTENTION + "o_proj", attended.transpose(0, 1).flatten(1))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _heads(self, name: str, u: Tensor, heads: int) -> Tensor:
        return self._linear(ATTENTION + name, u).unflatten(-1, (heads, self.head_dim)).transpose(0, 1)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None].float() * self.frequencies
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def read_as(engine: str, config: dict[str, Any], stored: Mapping[str, Tensor], target_embedding: Tensor) -> Reading:
    """config.json and the file's tensors as that engine loads them for a target with this embedding [V, H].

    Raises EngineRefuses."""
    return READERS[engine](config, dict(stored), target_embedding.detach().cpu())


def _vllm(config: dict[str, Any], stored: dict[str, Tensor], embedding: Tensor) -> Reading:
    """EagleLlamaForCausalLM: layer 0 without its input norm, fc without bias, the target's head. An unknown bias is
    ignored, any other unknown tensor an error, a missing one random."""
    architecture = engine_class(config)
    if architecture not in ("LlamaForCausalLM", "EagleLlamaForCausalLM"):
        raise EngineRefuses(f"there is no class Eagle{architecture}")
    only_silu(config)
    output_bias = bool(config.get("attention_bias") or config.get("bias"))
    shapes = _shapes(config, bool(config["qkv_bias"]) if "qkv_bias" in config else output_bias, output_bias)
    for name in stored:
        if name not in shapes and name != "embed_tokens.weight" and not name.endswith(".bias"):
            raise EngineRefuses(f"no module or parameter is named {name}")
    return _reading(config, shapes, stored, stored.get("embed_tokens.weight", embedding), engine_rope(config))


def _sglang(config: dict[str, Any], stored: dict[str, Tensor], embedding: Tensor) -> Reading:
    """LlamaForCausalLMEagle: fc always has a bias, `attention_bias` or `bias` gives all four projections one, the
    target's embedding replaces any other, unknown tensors are ignored, missing ones random."""
    architecture = engine_class(config)
    if architecture != "LlamaForCausalLMEagle":
        raise EngineRefuses(f"{architecture} is no class of drafts")
    only_silu(config)
    biased = bool(config.get("attention_bias") or config.get("bias"))
    shapes = _shapes(config, biased, biased) | {"fc.bias": (config["hidden_size"],)}
    return _reading(config, shapes, stored, embedding, engine_rope(config))


def _eagle(config: dict[str, Any], stored: dict[str, Tensor], embedding: Tensor) -> Reading:
    """Model of cnets1.py, loaded strictly with its embedding; `bias` (true when absent) is fc's, `qkv_bias` that of
    q, k and v; heads are hidden_size / heads wide; a scaled rope has the base 10,000."""
    if config.get("num_hidden_layers", 1) != 1:
        raise EngineRefuses("it builds as many layers as config.json says and finds one")
    shapes = _shapes(config | {"head_dim": None}, bool(config.get("qkv_bias")), False)
    if config.get("bias", True):
        shapes["fc.bias"] = (config["hidden_size"],)
    shapes["embed_tokens.weight"] = (config["vocab_size"], config["hidden_size"])
    if differing := sorted(shapes.keys() ^ stored.keys()):
        raise EngineRefuses(f"it loads strictly, and {', '.join(differing)} is missing or unknown")
    scaling, theta = config.get("rope_scaling"), config.get("rope_theta", 10_000.0)
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        if scaling.get("type") not in ("linear", "dynamic"):
            raise EngineRefuses(f"it knows no rope_scaling of type {scaling.get('type')}")
        rope = {"rope_type": scaling["type"], "rope_theta": 10_000.0, "factor": scaling["factor"]}
    return _reading(config | {"head_dim": None}, shapes, stored, stored["embed_tokens.weight"], rope)


READERS: dict[str, Callable[[dict[str, Any], dict[str, Tensor], Tensor], Reading]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "eagle": _eagle,
}


def _shapes(config: dict[str, Any], qkv_bias: bool, output_bias: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    rows = {"q_proj": heads * width, "k_proj": (config.get("num_key_value_heads") or heads) * width}
    rows["v_proj"] = rows["k_proj"]
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
    for name, count in rows.items():
        shapes[f"{ATTENTION}{name}.weight"] = (count, hidden)
        if qkv_bias:
            shapes[f"{ATTENTION}{name}.bias"] = (count,)
    shapes[f"{ATTENTION}o_proj.weight"] = (hidden, heads * width)
    if output_bias:
        shapes[f"{ATTENTION}o_proj.bias"] = (hidden,)
    shapes |= {f"{MLP}gate_proj.weight": (inner, hidden), f"{MLP}up_proj.weight": (inner, hidden)}
    return shapes | {f"{MLP}down_proj.weight": (hidden, inner), "layers.0.post_attention_layernorm.weight": (hidden,)}


def _reading(
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, Tensor],
    embedding: Tensor,
    rope: dict[str, Any],
) -> Reading:
    weights = {}
    for name, shape in shapes.items():
        weights[name] = stored[name].float() if name in stored else torch.full(shape, torch.nan)
        if tuple(weights[name].shape) != shape:
            raise EngineRefuses(f"{name} is {tuple(weights[name].shape)} where {shape} is expected")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    frequencies, magnitude = frequencies_of(rope, width)
    return Reading(
        weights=weights,
        embedding=embedding,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=width,
        eps=config.get("rms_norm_eps", 1e-6),
        activation=ACT2FN[config.get("hidden_act", "silu")],
        frequencies=frequencies,
        magnitude=magnitude,
    )


def engine_class(config: dict[str, Any]) -> str:
    """The model class that config.json names; `none` where it names none."""
    named = config.get("architectures") or ("none",)
    return " ".join(map(str, named)) if isinstance(named, (list, tuple)) else str(named)


def only_silu(config: dict[str, Any]) -> None:
    """Raise EngineRefuses for any other activation."""
    if config.get("hidden_act", "silu") != "silu":
        raise EngineRefuses(f"it supports no activation {config['hidden_act']}")


def engine_rope(config: dict[str, Any]) -> dict[str, Any]:
    """As LlamaConfig of transformers 5 reads it: `rope_parameters` before `rope_scaling` and `rope_theta`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    return rope | {"rope_type": rope.get("rope_type") or rope.get("type") or "default", "rope_theta": float(theta)}


def frequencies_of(rope: dict[str, Any], width: int) -> tuple[Tensor, float]:
    """Rotation by a position, [d / 2] radians, and the factor on cosine and sine; formulas of arXiv 2104.09864,
    2306.15595 (linear), 2309.00071 (YaRN) and Llama 3.1's model card (llama3)."""
    kind, theta = rope["rope_type"], rope["rope_theta"]
    plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if kind == "default":
        return plain.float(), 1.0
    if kind == "linear":
        return (plain / rope["factor"]).float(), 1.0
    if kind == "llama3":
        waves = rope["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the trained length
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        return (plain * (kept + (1 - kept) / rope["factor"])).float(), 1.0
    if kind == "yarn":
        trained, factor = rope["original_max_position_embeddings"], rope["factor"]
        edges = [_yarn_edge(rope.get(name) or turns, width, theta, trained) for name, turns in YARN_TURNS]
        low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), width - 1)
        scaled = ((torch.arange(width // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        return (plain * (1 - scaled + scaled / factor)).float(), 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    raise EngineRefuses(f"positions of rope_type {kind} are not computed as in training")


YARN_TURNS = (("beta_fast", 32), ("beta_slow", 1))


def _yarn_edge(turns: float, width: int, theta: float, trained: int) -> float:
    """The dimension that turns so often within the trained length."""
    return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
