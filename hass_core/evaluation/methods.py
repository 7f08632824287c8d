"""The decoders that an evaluation compares, all over one runner of the target.

plain    one token a pass                         pld    n-gram lookup in the context
sps      a small language model drafts a chain    eagle  the draft in a static tree
eagle2   a draft trained with n = 1 and no Top-K, in a dynamic tree
hass     the draft under test, in a dynamic tree
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hass_core.config import TargetConfig, TreeConfig
from hass_core.decoding.decoder import Decoder, PlainDecoder, SpeculativeDecoder
from hass_core.decoding.rivals.lookup import PromptLookupDecoder
from hass_core.decoding.rivals.speculative_sampling import SpeculativeSamplingDecoder, first_layers
from hass_core.draft_model.checkpoint import load_draft
from hass_core.errors import DraftMismatch
from hass_core.evaluation.method_names import EAGLE, PLAIN, PLD, SPS, draft_folder
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import Runner, make_runner


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
