"""The fastest exact decoder for a draft on this machine: measured, and plain where no tree wins."""

from hass_core.decoding.generation import Decoder
from hass_core.decoding.plain import PlainDecoder
from hass_core.decoding.planner import Plan, make_plan
from hass_core.decoding.speculative import SpeculativeDecoder
from hass_core.draft_model.checkpoint import Draft
from hass_core.target_model.runner import Runner


def choose_decoder(runner: Runner, draft: Draft, prompts: list[list[int]], rows: int = 1) -> tuple[Decoder, Plan]:
    """The decoder to use for `rows` rows at once, and the measurements behind it.

    `prompts` (token ids) should resemble what will be decoded. Outputs are the same whichever is chosen.
    """
    plan = make_plan(runner, draft, prompts, rows)
    return decoder_of(plan, runner, draft), plan


def decoder_of(plan: Plan, runner: Runner, draft: Draft) -> Decoder:
    """Speculative with the plan's tree where that pays, else plain."""
    return SpeculativeDecoder(runner, draft, plan.tree()) if plan.pays else PlainDecoder(runner)
