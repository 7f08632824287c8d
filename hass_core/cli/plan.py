"""`hass plan`: measure this machine and a draft, and say which tree decodes fastest."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hass_core.cli.common import console, show_json
from hass_core.cli.draft_address import target_of
from hass_core.cli.options import AsJson, Draft, TargetSource, out_file
from hass_core.config import SamplingConfig


def plan(
    draft: Draft,
    target: TargetSource = None,
    rows: Annotated[int, typer.Option(min=1, max=4096, help="Prompts decoded at once")] = 1,
    temperature: Annotated[float, typer.Option(min=0, max=5, help="0 = greedy")] = 0.0,
    eight_bits: Annotated[bool, typer.Option("--eight-bits", help="Draft with weights in fp8")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan as JSON", callback=out_file)] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the tree for this machine: the best of each size, and whether it beats plain decoding.

    Example: hass plan .hass/store/draft/DIGEST --out plan.json
    """
    from hass_core.decoding.answers import StopRule
    from hass_core.decoding.planner import make_plan
    from hass_core.draft_model.checkpoint import load_draft
    from hass_core.evaluation.steps import planning_prompts
    from hass_core.target_model.loader import load_target
    from hass_core.target_model.runner import make_runner

    loaded = load_target(target_of(draft, target))
    measured = replace(load_draft(draft, loaded), eight_bits=eight_bits)
    prompts, sampling = planning_prompts(loaded), SamplingConfig(temperature=temperature)
    found = make_plan(make_runner(loaded), measured, prompts, StopRule.of(loaded), rows, sampling=sampling)
    if out is not None:
        out.write_text(found.model_dump_json(indent=1))
    if as_json:
        return show_json(found)
    table = Table("nodes", "depth", "top-k", "vocabulary", "τ", "ms a cycle", "tokens/s")
    for choice in found.curve:
        style = "bold" if choice == found.best else None
        shape = choice.nodes, choice.depth, choice.top_k, choice.vocabulary or "all"
        figures = choice.tau, choice.cycle_ms, choice.tokens_per_second
        table.add_row(*map(str, shape), *(f"{figure:g}" for figure in figures), style=style)
    console.print(table)
    plain = found.plain_tokens_per_second
    verdict = f"{found.best.tokens_per_second / plain:.2f} × plain" if found.pays else "decode plainly: no tree wins"
    console.print(f"plain {plain:.1f} tokens/s; best {found.best.tokens_per_second:.1f}, {verdict}")
