"""The decoder of `hass chat` and `hass serve`: plain, with a given tree, or with the best one for this machine."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hass_core.cli.common import notes
from hass_core.config import TreeConfig

if TYPE_CHECKING:
    from hass_core.decoding.decoder import Decoder
    from hass_core.target_model.loader import Target


def build_decoder(
    target: "Target", folder: Path | None, tree: TreeConfig | None, prompt_tokens: int | None = None
) -> "Decoder":
    """Plain without a draft; speculative with `tree`; measured and chosen when `tree` is None. `prompt_tokens` is
    that setting of a tree for either."""
    from hass_core.decoding.answers import StopRule
    from hass_core.decoding.decoder import PlainDecoder, SpeculativeDecoder
    from hass_core.decoding.planner import choose_decoder
    from hass_core.draft_model.checkpoint import load_draft
    from hass_core.evaluation.steps import planning_prompts
    from hass_core.target_model.runner import make_runner

    runner = make_runner(target)
    if folder is None:
        return PlainDecoder(runner)
    draft = replace(load_draft(folder, target), prompt_tokens=prompt_tokens)
    if tree is not None:
        return SpeculativeDecoder(runner, draft, tree.model_copy(update={"prompt_tokens": prompt_tokens}))
    with notes.status("measuring this machine and the draft"):
        decoder, plans = choose_decoder(runner, draft, planning_prompts(target), StopRule.of(target))
    for plan in plans:
        best = plan.best
        chosen = f"{best.nodes} nodes, {best.depth} levels" if plan.pays else "plain decoding, since no tree wins here"
        notes.print(f"[dim]chosen at temperature {plan.temperature:g}: {chosen}[/]")
    return decoder
