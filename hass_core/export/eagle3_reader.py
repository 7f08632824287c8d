"""Exported folders of the second architecture read back by each engine's own rules, and what the engine would draw.

Independent of this project's draft model on purpose, as `readers.py`: names, defaults and arithmetic are written from
the engines' sources. What an engine would leave uninitialised is NaN here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hass_core.export.readers import (
    ATTENTION,
    MLP,
    EngineRefuses,
    Reading,
    engine_class,
    engine_rope,
    frequencies_of,
    only_silu,
)

NORMS = ("layers.0.input_layernorm.weight", "layers.0.hidden_norm.weight", "layers.0.post_attention_layernorm.weight")


@dataclass(frozen=True)
class Eagle3Reading(Reading):
    """A draft as an engine has it in memory."""

    token_ids: Tensor  # [D] the target's token of each row of the head
    vocab_size: int
    norm_output: bool
    norm_before_residual: bool
    layers: tuple[int, ...] | None  # k: it is given the states after k layers; None: the last hidden state

    def given(self, states: Tensor, last: Tensor) -> Tensor:
        """What the layer takes [L, H], of the target's states after k = 0 … N layers [N + 1, L, H] and the last of them
        after the final norm [L, H]."""
        if self.layers is None:
            return last
        taken = [states[layer] for layer in self.layers]
        norms = [self.weights.get(f"fc_norm.{i}.weight") for i in range(len(taken))]
        normed = [x if norm is None else self._normed(x, norm) for x, norm in zip(taken, norms, strict=True)]
        return self._linear("fc", torch.cat(normed, -1))

    def features(self, token_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        """The states [L, H] that the next row takes, of rows with next tokens [L] and features [L, H]; causal."""
        return self._ends(token_ids, features, positions)[1 if self.norm_output else 0]

    def logits(self, token_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        """[L, V]; tokens that it cannot draft have -inf."""
        drawn = self._ends(token_ids, features, positions)[1] @ self.weights["lm_head.weight"].T
        whole = drawn.new_full((len(drawn), self.vocab_size), -torch.inf)
        whole[:, self.token_ids] = drawn
        return whole

    def _ends(self, token_ids: Tensor, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output [L, H], and that after the final norm."""
        embedded = self._normed(self.embedding[token_ids].float(), self.weights[NORMS[0]])
        hidden = self._normed(features, self.weights[NORMS[1]])
        residual = hidden if self.norm_before_residual else features
        u = residual + self.attended(torch.cat([embedded, hidden], -1), positions)
        normed = self._normed(u, self.weights[NORMS[2]])
        gated = self.activation(self._linear(MLP + "gate_proj", normed)) * self._linear(MLP + "up_proj", normed)
        out = u + self._linear(MLP + "down_proj", gated)
        return out, self._normed(out, self.weights["norm.weight"])

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight


def read_eagle3_as(
    engine: str, config: dict[str, Any], stored: Mapping[str, Tensor], embedding: Tensor, head: Tensor, layers: int
) -> Eagle3Reading:
    """config.json and the file's tensors as that engine loads them for a target of so many layers with these weights
    [V, H].

    Raises EngineRefuses.
    """
    if engine not in RULES:
        raise EngineRefuses("it knows this layout with three states of the target only")
    if engine_class(config) not in RULES[engine]:
        raise EngineRefuses(f"it has no such class of drafts: {engine_class(config)}")
    only_silu(config)
    layer = {name.replace("midlayer.", "layers.0.", 1): tensor for name, tensor in stored.items()}
    vllm = engine == "vllm"
    if not vllm and "draft_vocab_size" not in config:
        raise EngineRefuses("config.json has no draft_vocab_size")
    rows = len(head)
    size = config.get("draft_vocab_size") or rows
    taps = (config.get("eagle_config") or {}).get("use_aux_hidden_state", True)
    captured = CAPTURED[engine](config, layers) if taps else None
    if captured is not None and (missing := [k for k in captured if k > layers or (k == layers and not vllm)]):
        raise EngineRefuses(f"it cannot capture the state after layer {missing[0]} of {layers}")
    if captured is not None and len(captured) != _states(config):
        raise EngineRefuses(f"{len(captured)} states are captured for an fc of {_states(config)}")
    shapes = _shapes(config, size, taps)
    if vllm:
        _refuse_unknown(layer, {*shapes, "embed_tokens.weight", "t2d", *(() if size == rows else ("d2t",))})
    weights = {name: _loaded(layer, name, shape) for name, shape in shapes.items()}
    if "lm_head.weight" not in layer and vllm:
        weights["lm_head.weight"] = head.detach().cpu().float()[:size]
    offsets = layer.get("d2t", torch.zeros(size, dtype=torch.long)) if size < rows or not vllm else torch.zeros(size)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies, magnitude = frequencies_of(engine_rope(config), width)
    return Eagle3Reading(
        weights=weights,
        embedding=(layer.get("embed_tokens.weight", embedding) if vllm else embedding).detach().cpu(),
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=width,
        eps=config.get("rms_norm_eps", 1e-6),
        activation=F.silu,
        frequencies=frequencies,
        magnitude=magnitude,
        token_ids=(offsets.long() + torch.arange(size)).clamp(0, rows - 1),
        vocab_size=rows,
        norm_output=bool(config.get("norm_output")),
        norm_before_residual=vllm and bool(config.get("norm_before_residual")),
        layers=captured,
    )


RULES = {  # engine → names of its classes for this layout
    "vllm": ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM"),
    "sglang": ("LlamaForCausalLMEagle3",),
}


def _default(layers: int) -> list[int]:
    return [2, layers // 2, layers - 3]


def _captured_by_vllm(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """By its default runner, which reads the list at the top only; sorted, each once."""
    return tuple(sorted(set(config.get("eagle_aux_hidden_state_layer_ids") or _default(layers))))


def _captured_by_sglang(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """It reads the list in eagle_config only: numbers of layers whose output is meant; in the layers' order."""
    named = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    return tuple(sorted(set(_default(layers) if named is None else [layer + 1 for layer in named])))


CAPTURED = {"vllm": _captured_by_vllm, "sglang": _captured_by_sglang}


def _states(config: dict[str, Any]) -> int:
    """How many states fc is built for, by either engine."""
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    return config.get("num_aux_hidden_states") or (len(nested) if nested else 3)


def _shapes(config: dict[str, Any], size: int, taps: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    shared = (config.get("num_key_value_heads") or heads) * width
    states = _states(config)
    shapes: dict[str, tuple[int, ...]] = {
        f"{ATTENTION}q_proj.weight": (heads * width, 2 * hidden),
        f"{ATTENTION}k_proj.weight": (shared, 2 * hidden),
        f"{ATTENTION}v_proj.weight": (shared, 2 * hidden),
        f"{ATTENTION}o_proj.weight": (hidden, heads * width),
        f"{MLP}gate_proj.weight": (inner, hidden),
        f"{MLP}up_proj.weight": (inner, hidden),
        f"{MLP}down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (size, hidden),
        **dict.fromkeys(NORMS, (hidden,)),
    }
    if taps:
        shapes["fc.weight"] = (hidden, states * hidden)
        shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(states) if config.get("fc_norm")}
    return shapes


def _refuse_unknown(layer: Mapping[str, Tensor], known: set[str]) -> None:
    if unknown := sorted(name for name in layer if name not in known):
        raise EngineRefuses(f"no module or parameter is named {', '.join(unknown)}")


def _loaded(layer: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the file; where it is missing, ones of a norm and NaN of any other."""
    if name not in layer:
        return torch.full(shape, 1.0 if "norm" in name else torch.nan)
    if tuple(layer[name].shape) != shape:
        raise EngineRefuses(f"{name} is {tuple(layer[name].shape)} where {shape} is expected")
    return layer[name].float()
