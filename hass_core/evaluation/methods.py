"""The decoders that an evaluation compares, all over one runner of the target.

plain    one token a pass                         pld    n-gram lookup in the context
sps      a small language model drafts a chain    eagle  the draft in a static tree
eagle2   a draft trained with n = 1 and no Top-K, in a dynamic tree
hass     the draft under test, in a dynamic tree
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hass_core.config import TargetConfig, TreeConfig
from hass_core.decoding.generation import Decoder
from hass_core.decoding.plain import PlainDecoder
from hass_core.decoding.rivals.lookup import PromptLookupDecoder
from hass_core.decoding.rivals.speculative_sampling import SpeculativeSamplingDecoder, first_layers
from hass_core.decoding.speculative import SpeculativeDecoder
from hass_core.draft_model.checkpoint import load_draft
from hass_core.errors import ConfigError, DraftMismatch
from hass_core.evaluation.measure import PLAIN
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import Runner, make_runner

HASS, EAGLE, EAGLE2, SPS, PLD = "hass", "eagle", "eagle2", "sps", "pld"
TAKES_DRAFT = (HASS, EAGLE, EAGLE2, SPS)


def check_methods(methods: Sequence[str], drafts: Mapping[str, Path]) -> None:
    """Raise ConfigError when a method lacks its draft, or a draft is given for no method."""
    for name in drafts:
        if name not in TAKES_DRAFT:
            raise ConfigError(f"no method {name!r} takes a draft; those that do are {', '.join(TAKES_DRAFT)}")
    if EAGLE2 in methods and EAGLE2 not in drafts:
        raise ConfigError(
            "the method eagle2 needs a draft of its own, trained on the same data with training.align_steps = 1 and "
            "training.top_k_weight = 0; train one with `hass run draft -s training.align_steps=1 "
            "-s training.top_k_weight=0` and name its folder with --draft eagle2=DIR, or leave the method out"
        )


def build_decoders(
    target: Target, methods: Sequence[str], drafts: Mapping[str, Path], tree: TreeConfig
) -> dict[str, Decoder]:
    """The methods' decoders, `plain` always and first. Raises DraftMismatch when a draft belongs to another target."""
    runner = make_runner(target)
    others = [method for method in methods if method != PLAIN]
    return {PLAIN: PlainDecoder(runner), **{name: _build(name, runner, target, drafts, tree) for name in others}}


def _build(method: str, runner: Runner, target: Target, drafts: Mapping[str, Path], tree: TreeConfig) -> Decoder:
    if method == PLD:
        return PromptLookupDecoder(runner)
    if method == SPS:
        return SpeculativeSamplingDecoder(runner, make_runner(_small_model(target, drafts.get(SPS))))
    folder, shape = draft_folder(method, drafts), tree
    if method == EAGLE:
        shape = tree.model_copy(update={"kind": "static"})
    return SpeculativeDecoder(runner, load_draft(folder, target), shape, name=method)


def draft_folder(method: str, drafts: Mapping[str, Path]) -> Path:
    """The draft a method decodes with: its own; EAGLE falls back on EAGLE-2's, which is trained alike, then HASS's."""
    for name in (method, EAGLE2, HASS):
        if name in drafts:
            return drafts[name]
    raise ConfigError(f"the method {method} needs a draft; name its folder with --draft {method}=DIR")


def _small_model(target: Target, folder: Path | None) -> Target:
    """The drafting language model of `sps`: a given one with the target's tokens, or the target's own first layers."""
    if folder is None:
        return first_layers(target)
    small = load_target(TargetConfig(source=str(folder), device=str(target.device), dtype="auto"))
    if small.embedding.shape[0] != target.embedding.shape[0]:
        raise DraftMismatch(
            f"the small model {folder} has a vocabulary of {small.embedding.shape[0]} tokens, the target {target.name} "
            f"one of {target.embedding.shape[0]}; speculative sampling needs the same tokens on both sides"
        )
    return small
