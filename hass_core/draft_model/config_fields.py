"""Every field of a draft's config.json: read, without effect on what a draft computes, or refused by its name.

A draft is one Llama layer behind a fusion. Trainers copy their target's whole configuration into a draft's file, so a
field that would change that arithmetic may be meant or may be left over: only the draft's trainer knows, and a draft
that is taken without it would be another one without a word.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

READ = {  # by DraftArchitecture and the accounting of tensors
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("original_max_position_embeddings", "rms_norm_eps", "hidden_act", "hidden_activation", "num_hidden_layers"),
    *("bias", "qkv_bias", "attention_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"),
    *("architectures", "model_type", "layer_types", "sliding_window", "draft_vocab_size", "hass"),
}
WITHOUT_EFFECT = {
    *PretrainedConfig().to_dict().keys() - {"model_type", "architectures"},  # names, labels, what a call returns
    *("torch_dtype", "auto_map", "use_cache", "pretraining_tp", "initializer_range", "initializer_factor"),
    *("use_return_dict", "torchscript", "tokenizer_class", "finetuning_task", "task_specific_params", "prefix"),
    *("unsloth_version", "unsloth_fixed", "attn_implementation", "use_flash_attention", "num_labels"),
    # probabilities and weights of a training
    *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "residual_dropout"),
    *("router_aux_loss_coef", "router_z_loss_coef", "output_router_logits", "router_jitter_noise"),
    # of drawing tokens: whoever decodes says how
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty", "length_penalty"),
    *("max_length", "min_length", "num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty"),
    # of layers that a draft does not have: the names of its tensors tell that it has none
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
    *("shared_expert_intermediate_size", "mlp_only_layers", "norm_topk_prob", "moe_layer_freq"),
    # where windows begin: whether there are any is told by `sliding_window` and `layer_types`
    *("use_sliding_window", "max_window_layers", "sliding_window_pattern"),
}
PLAIN: dict[str, tuple[Any, ...]] = {  # values with which the layer is Llama's; absent and null are others' business
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "rope_is_neox_style": (True,),
    "use_rope": (True,),
    "scale_attn_weights": (True,),
    "is_causal": (True,),
    "hidden_size_per_layer_input": (0,),
    "no_rope_layer_interval": (0,),
}
LLAMA_LAYERS = {  # model types whose layer differs from Llama's in nothing but biases and norms, which tensors show
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "eagle"),
}


def refused_fields(config: dict[str, Any]) -> Iterator[str]:
    """Fields of a draft's config.json that would change what it computes, each with its value."""
    for name, value in config.items():
        if not _is_plain(name, value):
            yield f"{name} = {value!r}"
    kind = config.get("model_type")
    if kind is not None and (not isinstance(kind, str) or kind not in LLAMA_LAYERS):
        yield f"model_type = {kind!r} (its layers compute otherwise than Llama's)"
    if (size := config.get("draft_vocab_size")) not in (None, 0, config.get("vocab_size")):
        yield f"draft_vocab_size = {size!r}"
    yield from _windows(config)


def _is_plain(name: str, value: Any) -> bool:
    if name in READ or name in WITHOUT_EFFECT or name.startswith("_") or name.endswith("_token_id"):
        return True
    return value is None or (value in PLAIN[name] if name in PLAIN else value in (False, 0, "", [], {}))


def _windows(config: dict[str, Any]) -> Iterator[str]:
    """What makes a token attend to some of those before it only; a window as long as the context does not."""
    kinds = config.get("layer_types")
    if kinds and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        yield f"layer_types = {kinds!r}"
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings") or 2048
    whole = kinds or config.get("use_sliding_window") is False or (isinstance(window, int) and window >= longest)
    if window and not whole:
        yield f"sliding_window = {window!r}"
