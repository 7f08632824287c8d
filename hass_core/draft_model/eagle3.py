"""The second draft architecture, EAGLE-3's layer over the target's last hidden state: its sizes, tensors and settings.

It estimates no feature. The layer attends with the embedding and the feature side by side, each normed, and what it
returns is read by a head of its own, over all of the target's tokens or D of them. Layout and formulas are those that
vLLM 0.32 (`model_executor/models/llama_eagle3.py`) and SGLang 0.5.23 (`srt/models/llama_eagle3.py`) serve.
"""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.errors import CorruptFile

LAYER, ELSEWHERE = "midlayer.", "layers.0."  # the same layer: official, and in some trainers' files
LM_HEAD, NORM, OFFSETS, DRAFTED = "lm_head.weight", "norm.weight", "d2t", "t2d"
TAPPED, TAPS = "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states"


class Eagle3Architecture(DraftArchitecture):
    """An EAGLE-3 draft that reads the target's hidden state after its final norm. No biases, no norms on q/k."""

    draft_vocab_size: int = Field(ge=1)  # D, of the head
    norm_output: bool = False  # EAGLE-3.1: the next row takes the state after the final norm, not before it

    @classmethod
    def of(cls, layer: DraftArchitecture, draft_vocab_size: int, norm_output: bool = False) -> "Eagle3Architecture":
        """With the sizes of a bare Llama layer (see `family.py`)."""
        return cls(**layer.model_dump(), draft_vocab_size=draft_vocab_size, norm_output=norm_output)

    @classmethod
    def from_config_json(cls, config: dict[str, Any], names: Collection[str]) -> "Eagle3Architecture":
        """Read a draft's config.json. A `draft_vocab_size` that is absent or null is all of the target's tokens.

        Raises as DraftArchitecture's.
        """
        check_fields(config)
        base = DraftArchitecture.from_config_json(config, ())
        size = config.get("draft_vocab_size") or base.vocab_size
        if size > base.vocab_size:
            raise CorruptFile(f"the draft's config.json makes no sense: draft_vocab_size is {size}")
        return cls.of(base, size, bool(config.get("norm_output", False)))

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
        return shapes | {NORM: (hidden,), LM_HEAD: (self.draft_vocab_size, hidden)}

    def to_config_json(self) -> dict[str, Any]:
        """config.json as SGLang reads it, and EAGLE's own code."""
        return super().to_config_json() | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "eagle_config": {"use_aux_hidden_state": False},
            "norm_output": self.norm_output,
        }


def check_fields(config: dict[str, Any]) -> None:
    """Raise CorruptFile where a field that only EAGLE-3 drafts have is of another kind than it must be."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "draft_vocab_size": int,
        "eagle_config": dict,
        TAPPED: list,
        TAPS: int,
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
        or any(name in config for name in ("eagle_config", TAPPED))
        or config.get("speculators_model_type") == "eagle3"
        or (fusion is not None and fusion.ndim == 2 and isinstance(hidden, int) and fusion.shape[1] == 3 * hidden)
    )


NAMES = (OFFSETS, DRAFTED, LAYER, f"{ELSEWHERE}hidden_norm.", "fc_norm.", "input_norm.", "mask_hidden")
