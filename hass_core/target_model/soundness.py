"""What a target must be for a draft to be trained for it; told when it is loaded, before anything is paid for.

Drafts are trained and verified on this: the features are the hidden states after the final norm, the logits are the
output projection of the features and nothing else, and each layer keeps keys and values per token.
"""

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from hass_core.errors import TargetError
from hass_core.target_model.kv_cache import LayerShape

FULL, SLIDING = "full_attention", "sliding_attention"
MOST_NAMED = 4
PROBED_TOKENS = 4


def check_config(config: PretrainedConfig, name: str) -> None:
    """What can be told before the weights are read. Raises TargetError."""
    quantization = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if quantization:
        kind = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise TargetError(
            f"the weights of the target {name} are quantised ({kind.get('quant_method')}), and drafts "
            "are trained on plain ones: give the model it was made from; its draft serves the quantised one too"
        )
    if config.is_encoder_decoder:
        raise TargetError(f"the target {name} has an encoder ({config.model_type}); give a decoder-only language model")
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and not (type(longest) is int and longest >= 0):  # 0: of no end
        raise TargetError(f"the target {name} says max_position_embeddings = {longest!r}; mend its config.json")


def check_weights(found: dict[str, Any], name: str) -> None:
    """`found` is transformers' report of loading: it only warns of weights that it makes up or drops.

    Raises TargetError naming them.
    """
    mismatched = [f"{n} {list(stored)} for {list(wanted)}" for n, stored, wanted in found["mismatched_keys"]]
    for what, tensors in (
        ("lacks weights that its configuration asks for", found["missing_keys"]),
        ("has weights of other sizes than its configuration says", mismatched),
        ("has weights that its configuration has no place for", found["unexpected_keys"]),
    ):
        if tensors:
            raise TargetError(f"the target {name} {what}: {_named(tensors)}; fetch it again, or mend its config.json")
    if problems := found.get("error_msgs"):
        raise TargetError(f"the target {name} cannot be loaded: {problems[0]}")


def _named(tensors: Collection[str]) -> str:
    shown = sorted(tensors)[:MOST_NAMED]
    more = len(tensors) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Raise TargetError where the tokenizer has a token that the embedding has no row for; spare rows are no fault."""
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if tokens > rows:
        raise TargetError(
            f"the tokenizer of the target {name} has {tokens} tokens, its embedding {rows} rows; give the tokenizer "
            "that belongs to these weights"
        )


@torch.no_grad()
def check_finite(model: PreTrainedModel, name: str) -> None:
    """Raise TargetError for a model that computes NaN or infinite numbers of a few tokens."""
    embedding = cast(nn.Module, model.get_input_embeddings()).weight
    tokens = torch.arange(PROBED_TOKENS, device=cast(Tensor, embedding).device)[None]
    if not (bool(cast(Tensor, embedding).isfinite().all()) and bool(model(input_ids=tokens).logits.isfinite().all())):
        raise TargetError(
            f"the target {name} computes NaN or infinite numbers in {str(model.dtype).removeprefix('torch.')}: its "
            "weights are broken, or too large for this type; fetch it again, or set target.dtype"
        )


def check_model(model: PreTrainedModel, name: str) -> list[LayerShape]:
    """Run a few tokens through a model: what each layer keeps per token.

    Raises TargetError for a model whose logits are not its output projection of the features, bit for bit, or whose
    layers do not all keep keys and values, or attend in some other way than fully or through a sliding window.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds - {FULL, SLIDING}:
        raise TargetError(f"{name} has layers of kind {sorted(kinds)}; only {FULL} and {SLIDING} are known")
    head = cast(nn.Module | None, model.get_output_embeddings())
    if head is None:
        raise TargetError(f"{name} has no output projection; give a causal language model")
    bias = getattr(head, "bias", None)
    if bias is not None and bool(bias.any()):
        raise TargetError(
            f"the output projection of {name} has a bias, which a draft's head and the engines have no place for; "
            "choose another target"
        )
    cache = DynamicCache()
    if not _projects_features(model, head, cache):
        raise TargetError(
            f"{name} changes its logits after the output projection (scaling or soft-capping); drafts are trained "
            "and verified on the projection alone, choose another target"
        )
    return [_shape(layer, index, name) for index, layer in enumerate(cache.layers)]


@torch.no_grad()
def _projects_features(model: PreTrainedModel, head: nn.Module, cache: DynamicCache) -> bool:
    """Whether what the model's body gives goes into the head, and what the head gives comes out, unchanged."""
    seen: dict[str, Tensor] = {}

    def body_ran(module: nn.Module, inputs: Any, output: Any) -> None:
        seen["features"] = output.last_hidden_state

    def head_ran(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["taken"], seen["given"] = inputs[0], output

    embedding = cast(Tensor, model.get_input_embeddings().weight)
    token_ids = torch.arange(1, 1 + PROBED_TOKENS, device=embedding.device)[None]
    hooks = [model.base_model.register_forward_hook(body_ran), head.register_forward_hook(head_ran)]
    try:
        logits = cast(Any, model)(input_ids=token_ids, past_key_values=cache, use_cache=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    return seen.keys() >= {"features", "given"} and (
        _same(seen["features"], seen["taken"]) and _same(seen["given"], logits)
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal numbers, on whatever device and of whatever type; NaN is reported where features are made."""
    return a.shape == b.shape and torch.equal(a.float().nan_to_num(), b.to(a.device).float().nan_to_num())


def _shape(layer: Any, index: int, name: str) -> LayerShape:
    keys = getattr(layer, "keys", None)
    if keys is None or keys.dim() != 4:
        raise TargetError(
            f"layer {index} of {name} keeps no keys and values per token; only attention models can be decoded "
            "speculatively, choose another target"
        )
    return LayerShape(keys.shape[1], keys.shape[3])
