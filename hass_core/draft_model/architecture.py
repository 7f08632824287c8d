"""The draft model's sizes and conventions, and the one table of the tensors that follow from them.

A draft of the family `target` has the shape of the target's own layers: heads, rotary embedding with its scaling,
activation, norm epsilon, biases on q/k/v (Qwen2) and on the attention's output (Llama with attention_bias), norms on
q/k (Qwen3). One of the family `llama` has no such bias or norm and a SiLU, which is what every serving engine builds
(family.py chooses). A bias of the fusion layer is only ever one that an imported draft has: vLLM cannot serve it.
"""

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import LlamaConfig, PretrainedConfig

from hass_core.errors import CorruptFile, DraftMismatch, TargetError

NORMED_QK = ("qwen3", "qwen3_moe")
BIASED_QKV = ("qwen2", "qwen2_moe", "qwen2_5_vl_text", "qwen2_vl_text")
PLAIN_OUTPUT = ("glm", "glm4", "glm4_moe")  # their attention_bias is one of q/k/v alone
NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
BOUND_BY_TRAINING = ("longrope", "yarn", "llama3")  # ropes that turn on the length of the first training
FC_BIAS, O_BIAS = "fc.bias", "layers.0.self_attn.o_proj.bias"
QKV_BIASES = tuple(f"layers.0.self_attn.{part}_proj.bias" for part in "qkv")
QK_NORMS = tuple(f"layers.0.self_attn.{part}_norm.weight" for part in "qk")


Count = Annotated[int, Field(gt=0)]


class DraftArchitecture(BaseModel):
    """All that determines the shapes and the arithmetic of a draft model."""

    model_config = ConfigDict(frozen=True, strict=True)  # an engine reads "48" otherwise than 48, or not at all

    hidden_size: Count
    intermediate_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Annotated[Count, Field(multiple_of=2)]  # a rotation takes pairs
    vocab_size: Count
    max_position_embeddings: Count
    rope_parameters: dict[str, Any]
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    fc_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    target_model_type: str = "llama"

    @model_validator(mode="after")
    def _check(self) -> "DraftArchitecture":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key-value heads"
            )
        return self

    @classmethod
    def from_target_config(
        cls, config: PretrainedConfig, fc_bias: bool = False, whole_heads: bool = False
    ) -> "DraftArchitecture":
        """One layer in the target's own shape. Sizes a target lacks take the Llama family's usual values.

        Raises TargetError where the target rotates a part of each head only, unless `whole_heads`: a draft always
        rotates them whole.
        """
        text = config.get_text_config()
        heads = text.num_attention_heads
        if (part := partial_rotary(text.to_dict())) != 1 and not whole_heads:
            raise TargetError(
                f"the target rotates {part:g} of each head (partial_rotary_factor), which a draft of its own shape "
                'cannot; set draft.family = "llama"'
            )
        biased = bool(_field(text, "attention_bias", False))
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
            hidden_act=_field(text, "hidden_activation", _field(text, "hidden_act", "silu")),
            qkv_bias=text.model_type in BIASED_QKV or biased,
            o_bias=biased and text.model_type not in PLAIN_OUTPUT,
            qk_norm=text.model_type in NORMED_QK,
            fc_bias=fc_bias,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            target_model_type=text.model_type,
        )

    @classmethod
    def from_config_json(cls, config: dict[str, Any], names: Collection[str]) -> "DraftArchitecture":
        """Read a draft's config.json (ours, EAGLE's or HASS's). Which biases and norms it has is told by the `names`
        of its tensors, not by the file: official files give `bias` a meaning that their own trainer does not follow.

        Raises CorruptFile for missing or senseless fields, DraftMismatch for a rotation of parts of heads.
        """
        if missing := [name for name in NEEDED if not config.get(name)]:
            raise CorruptFile(f"the draft's config.json lacks {', '.join(missing)}; take it from the draft's source")
        try:
            heads = config["num_attention_heads"]
            part, _ = partial_rotary(config), contradicting_ropes(config)  # both forms of rope can be read
            read = cls(
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_attention_heads=heads,
                num_key_value_heads=_given(config, "num_key_value_heads", heads),
                head_dim=_given(config, "head_dim", config["hidden_size"] // heads),
                vocab_size=config["vocab_size"],
                max_position_embeddings=_given(config, "max_position_embeddings", 2048),
                rope_parameters=rope_parameters(config),
                rms_norm_eps=_given(config, "rms_norm_eps", 1e-6),
                hidden_act=config.get("hidden_activation") or config.get("hidden_act") or "silu",
                qkv_bias=any(name in names for name in QKV_BIASES),
                o_bias=O_BIAS in names,
                qk_norm=any(name in names for name in QK_NORMS),
                fc_bias=FC_BIAS in names,
                bos_token_id=config.get("bos_token_id"),
                eos_token_id=config.get("eos_token_id"),
                target_model_type=(config.get("hass") or {}).get("target_model_type", "llama"),
            )
        except (ValidationError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise CorruptFile(f"the draft's config.json makes no sense: {_first_line(error)}") from None
        if part != 1:
            raise DraftMismatch(
                f"the draft rotates {part:g} of each head (partial_rotary_factor in its config.json), which is not "
                "supported; train a draft for this target instead"
            )
        return read

    @property
    def own_head(self) -> bool:
        """Whether a head of the draft's own reads what it returns. If not, that is an estimate of the target's next
        feature, and the target's head reads it."""
        return False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the draft, no others. Names are flat (`fc.weight`, `layers.0.…`): vLLM and
        SGLang put `model.` in front themselves."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, 2 * hidden),
            "layers.0.self_attn.q_proj.weight": (queries, hidden),
            "layers.0.self_attn.k_proj.weight": (keys, hidden),
            "layers.0.self_attn.v_proj.weight": (keys, hidden),
            "layers.0.self_attn.o_proj.weight": (hidden, queries),
            "layers.0.mlp.gate_proj.weight": (inner, hidden),
            "layers.0.mlp.up_proj.weight": (inner, hidden),
            "layers.0.mlp.down_proj.weight": (hidden, inner),
            "layers.0.post_attention_layernorm.weight": (hidden,),
        }
        if self.qkv_bias:
            shapes |= zip(QKV_BIASES, [(queries,), (keys,), (keys,)], strict=True)
        if self.o_bias:
            shapes[O_BIAS] = (hidden,)
        if self.qk_norm:
            shapes |= dict.fromkeys(QK_NORMS, (self.head_dim,))
        if self.fc_bias:
            shapes[FC_BIAS] = (hidden,)
        return shapes

    def to_config_json(self) -> dict[str, Any]:
        """config.json in the layout EAGLE, vLLM and SGLang read, without the `hass` section."""
        rope = dict(self.rope_parameters)
        theta = rope.pop("rope_theta", 10_000.0)
        renamed = {"rope_parameters", "qkv_bias", "o_bias", "qk_norm", "fc_bias", "target_model_type"}
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            **self.model_dump(exclude=renamed),
            "rope_theta": theta,
            "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
            "tie_word_embeddings": False,
            "bias": False,  # engines read it as a bias on q/k/v/o
        }
        config |= {"qkv_bias": self.qkv_bias} if self.qkv_bias or self.o_bias else {}
        config |= {"qk_norm": True} if self.qk_norm else {}  # no engine reads it
        return config | ({"attention_bias": True} if self.o_bias else {})

    def rotary_config(self) -> LlamaConfig:
        """The configuration transformers' rotary embedding is built from."""
        return LlamaConfig(
            hidden_size=self.num_attention_heads * self.head_dim,  # the heads', which need not be the features'
            num_attention_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.rope_parameters),  # pyright: ignore[reportArgumentType]
        )


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in transformers 5's form, from either form. Where layers differ, those of full attention.

    Sections for pictures are left out: in text their three positions are one.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    old = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or ("default" if old == "mrope" else old) or "default"
    rope["rope_theta"] = float(_given(rope, "rope_theta", _given(config, "rope_theta", 10_000.0)))
    trained = config.get("original_max_position_embeddings")  # Phi-3 has it beside
    if trained and rope["rope_type"] in BOUND_BY_TRAINING:
        rope.setdefault("original_max_position_embeddings", trained)
    dropped = ("mrope_section", "mrope_interleaved", "partial_rotary_factor")
    return {name: value for name, value in sorted(rope.items()) if value is not None and name not in dropped}


def contradicting_ropes(config: dict[str, Any]) -> str | None:
    """What is wrong where config.json is written in both forms of rotary settings and they tell two embeddings."""
    new, scaling, theta = (config.get(name) for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    if not new or not (scaling or theta):
        return None
    newer = rope_parameters(config)
    elder = {name: value for name, value in config.items() if name != "rope_parameters"}
    other = rope_parameters(elder | {"rope_theta": theta or newer["rope_theta"]})
    if not scaling:  # transformers 4 had the base beside it: one that is alone says nothing of the rest
        other = newer | {"rope_theta": other["rope_theta"]}
    return None if other == newer else f"rope_parameters tell {newer}, rope_theta and rope_scaling {other}"


def partial_rotary(config: dict[str, Any]) -> float:
    """The share of each head that is rotated."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    return float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def _given(config: dict[str, Any], name: str, default: Any) -> Any:
    """A setting, or its default where it is absent or null: 0 is none of both."""
    value = config.get(name)
    return default if value is None else value


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, "))))
    return str(error)


def _field(config: PretrainedConfig, name: str, default: Any) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value
