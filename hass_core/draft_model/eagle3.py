"""The second draft architecture, EAGLE-3's layer over states of the target: its sizes, tensors and settings.

It estimates no feature. The layer attends with the embedding and the feature side by side, each normed, and what it
returns is read by a head of its own, over all of the target's tokens or D of them. Layout and formulas are those that
vLLM 0.32 (`model_executor/models/llama_eagle3.py`) and SGLang 0.5.23 (`srt/models/llama_eagle3.py`) serve.
"""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from hass_core.draft_model.architecture import Count, DraftArchitecture
from hass_core.errors import CorruptFile

LAYER, ELSEWHERE = "midlayer.", "layers.0."  # the same layer: official, and in some trainers' files
LM_HEAD, NORM, OFFSETS, DRAFTED = "lm_head.weight", "norm.weight", "d2t", "t2d"
FUSION = "fc.weight"
TAP_LAYERS, TAP_COUNT = "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states"


class Eagle3Architecture(DraftArchitecture):
    """An EAGLE-3 draft that reads the target's hidden state after its final norm, or fuses those after some of its
    layers. No biases, no norms on q/k."""

    draft_vocab_size: int = Field(ge=1)  # D, of the head
    norm_output: bool = False  # EAGLE-3.1: the next row takes the state after the final norm, not before it
    taps: tuple[Count, ...] = ()  # layers whose states are fused, ascending, k the one after k layers; none: the last
    fc_norm: bool = False  # EAGLE-3.1: each of them is normed before

    @classmethod
    def of(
        cls,
        layer: DraftArchitecture,
        draft_vocab_size: int,
        norm_output: bool = False,
        taps: tuple[int, ...] = (),
        fc_norm: bool = False,
    ) -> "Eagle3Architecture":
        """With the sizes of a bare Llama layer (see `family.py`)."""
        own = {"draft_vocab_size": draft_vocab_size, "norm_output": norm_output, "taps": taps, "fc_norm": fc_norm}
        return cls(**layer.model_dump(), **own)

    @classmethod
    def from_config_json(
        cls, config: dict[str, Any], names: Collection[str], taps: tuple[int, ...] = ()
    ) -> "Eagle3Architecture":
        """Read a draft's config.json. A `draft_vocab_size` that is absent or null is all of the target's tokens. Which
        `taps` it means depends on the target: see `eagle3_files.py`.

        Raises as DraftArchitecture's.
        """
        check_fields(config)
        base = DraftArchitecture.from_config_json(config, ())
        size = config.get("draft_vocab_size") or base.vocab_size
        if size > base.vocab_size:
            raise CorruptFile(f"the draft's config.json makes no sense: draft_vocab_size is {size}")
        fc_norm = bool(taps) and bool(config.get("fc_norm"))
        return cls.of(base, size, bool(config.get("norm_output", False)), taps, fc_norm)

    @property
    def own_head(self) -> bool:
        return True

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """See DraftArchitecture; d2t and t2d, which are no weights, are not among them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (queries, 2 * hidden),
            "self_attn.k_proj.weight": (keys, 2 * hidden),
            "self_attn.v_proj.weight": (keys, 2 * hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "hidden_norm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        shapes = {LAYER + name: shape for name, shape in layer.items()}
        if self.taps:
            shapes[FUSION] = (hidden, len(self.taps) * hidden)
        if self.fc_norm:
            shapes |= {tap_norm(i): (hidden,) for i in range(len(self.taps))}
        return shapes | {NORM: (hidden,), LM_HEAD: (self.draft_vocab_size, hidden)}

    def to_config_json(self) -> dict[str, Any]:
        """config.json as SGLang reads it; of a draft that fuses states as vLLM does, too."""
        config = super().to_config_json()
        del config["taps"], config["fc_norm"]
        return config | {
            "architectures": ["LlamaForCausalLMEagle3"],
            **(self.tapping() if self.taps else {"eagle_config": {"use_aux_hidden_state": False}}),
            "norm_output": self.norm_output,
        }

    def tapping(self) -> dict[str, Any]:
        """The fields that say which states are fused: to vLLM at the top, k for the one after k layers; to SGLang in
        `eagle_config`, where a number is that of the layer, from 0 on, whose output it is."""
        nested = {"use_aux_hidden_state": True, TAP_LAYERS: [layer - 1 for layer in self.taps]}
        return {"eagle_config": nested, TAP_LAYERS: list(self.taps), TAP_COUNT: len(self.taps), "fc_norm": self.fc_norm}


def tap_norm(number: int) -> str:
    """The tensor of the norm of a tap, from 0 on."""
    return f"fc_norm.{number}.weight"


def check_fields(config: dict[str, Any]) -> None:
    """Raise CorruptFile where a field that only EAGLE-3 drafts have is of another kind than it must be."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "draft_vocab_size": int,
        "eagle_config": dict,
        TAP_LAYERS: list,
        TAP_COUNT: int,
        "norm_output": bool,
        "fc_norm": bool,
        "rms_norm_eps": (int, float),
    }
    for name, kind in kinds.items():
        value = config.get(name)
        wrong = value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool))
        if wrong or (name == "draft_vocab_size" and value is not None and value < 0):
            raise CorruptFile(f"the draft's config.json makes no sense: {name} is {value!r}")


def is_eagle3(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a draft's files are those of an EAGLE-3 draft, whatever is wrong with them."""
    named = config.get("architectures") or ()
    classes = named if isinstance(named, (list, tuple)) else (named,)
    hidden, fusion = config.get("hidden_size"), tensors.get("fc.weight")
    return (
        any(name.startswith(NAMES) for name in tensors)
        or any("eagle3" in str(name).lower() for name in classes)
        or any(name in config for name in ("eagle_config", TAP_LAYERS))
        or config.get("speculators_model_type") == "eagle3"
        or (fusion is not None and fusion.ndim == 2 and isinstance(hidden, int) and fusion.shape[1] == 3 * hidden)
    )


NAMES = (OFFSETS, DRAFTED, LAYER, f"{ELSEWHERE}hidden_norm.", "fc_norm.", "input_norm.", "mask_hidden")
