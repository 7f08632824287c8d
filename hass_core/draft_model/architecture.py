"""The draft model's sizes and conventions, taken from the target's configuration and written as a config.json.

Everything follows the target: hidden size, heads, rotary embedding with its scaling, activation, norm epsilon, biases
on q/k/v (Qwen2), norms on q/k (Qwen3). Only the bias of the fusion layer is a choice, and off by default because vLLM
cannot serve one.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import LlamaConfig, PretrainedConfig

NORMED_QK = ("qwen3", "qwen3_moe")
BIASED_QKV = ("qwen2", "qwen2_moe", "qwen2_5_vl_text", "qwen2_vl_text")


class DraftArchitecture(BaseModel):
    """All that determines the shapes and the arithmetic of a draft model."""

    model_config = ConfigDict(frozen=True)

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    fc_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    target_model_type: str = "llama"

    @classmethod
    def from_target_config(cls, config: PretrainedConfig, fc_bias: bool = False) -> "DraftArchitecture":
        """One layer in the target's own shape. Sizes a target lacks take the Llama family's usual values."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            hidden_size=text.hidden_size,
            intermediate_size=_field(text, "intermediate_size", 4 * text.hidden_size),
            num_attention_heads=heads,
            num_key_value_heads=_field(text, "num_key_value_heads", heads),
            head_dim=_field(text, "head_dim", text.hidden_size // heads),
            vocab_size=text.vocab_size,
            max_position_embeddings=_field(text, "max_position_embeddings", 4096),
            rope_parameters=rope_parameters(text.to_dict()),
            rms_norm_eps=_field(text, "rms_norm_eps", 1e-6),
            hidden_act=_field(text, "hidden_act", "silu"),
            qkv_bias=text.model_type in BIASED_QKV or bool(_field(text, "attention_bias", False)),
            qk_norm=text.model_type in NORMED_QK,
            fc_bias=fc_bias,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            target_model_type=text.model_type,
        )

    @classmethod
    def from_config_json(cls, config: dict[str, Any], qk_norm: bool, fc_bias: bool) -> "DraftArchitecture":
        """Read a draft's config.json (ours, EAGLE's or HASS's). The last two are told by the tensors, not by the file:
        official files give `bias` a meaning that their own trainer does not follow."""
        heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            rope_parameters=rope_parameters(config),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            hidden_act=config.get("hidden_act", "silu"),
            qkv_bias=bool(config.get("qkv_bias")),
            qk_norm=qk_norm,
            fc_bias=fc_bias,
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=config.get("eos_token_id"),
            target_model_type=config.get("hass", {}).get("target_model_type", "llama"),
        )

    def to_config_json(self) -> dict[str, Any]:
        """config.json in the layout EAGLE, vLLM and SGLang read, without the `hass` section."""
        rope = dict(self.rope_parameters)
        theta = rope.pop("rope_theta", 10_000.0)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            **self.model_dump(exclude={"rope_parameters", "qkv_bias", "qk_norm", "fc_bias", "target_model_type"}),
            "rope_theta": theta,
            "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
            "tie_word_embeddings": False,
            "bias": False,  # engines read it as a bias on q/k/v/o
        }
        return config | ({"qkv_bias": True} if self.qkv_bias else {})

    def rotary_config(self) -> LlamaConfig:
        """The configuration transformers' rotary embedding is built from."""
        return LlamaConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.rope_parameters),  # pyright: ignore[reportArgumentType]
        )


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in transformers 5's form, from either form. Where layers differ, those of full attention."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    rope["rope_type"] = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    rope.pop("type", None)
    return {name: value for name, value in rope.items() if value is not None}


def _field(config: PretrainedConfig, name: str, default: Any) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value
