"""`hass evaluate`: a draft and its rivals on the same questions."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hass_core.cli.common import console, progress_bar, settings, show, show_json
from hass_core.cli.draft_address import find_draft, with_target_of
from hass_core.cli.engine_options import EngineOptions
from hass_core.cli.options import DRAFT, PRESET, AsJson, FileOrPreset, Out, Overrides
from hass_core.errors import BadInput
from hass_core.evaluation.benchmark_names import check_benchmarks
from hass_core.evaluation.method_names import HASS, check_methods


def evaluate(
    drafts: Annotated[
        list[str], typer.Argument(metavar="DRAFT…", help=f"Each {DRAFT}, or METHOD=… for eagle2, eagle and sps")
    ],
    out: Out,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated: plain,pld,sps,eagle,eagle2,hass; default: as configured")
    ] = None,
    benchmarks: Annotated[str | None, typer.Option(help="Comma-separated: heldout, NAME=FILE, a file, …")] = None,
    temperatures: Annotated[str | None, typer.Option(help="Comma-separated, such as 0,1")] = None,
    server: Annotated[
        str | None, typer.Option(help="Ask this vLLM, SGLang or hass serve too, which serves the target with the draft")
    ] = None,
    plain_server: Annotated[
        str | None, typer.Option(help="A server without the draft beside --server: what its speed-up is over")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="vllm", help="Start this engine on this machine, plain and with the draft")
    ] = None,
    engine_python: Annotated[
        str | None, typer.Option(envvar="HASS_VLLM_PYTHON", help="Python of the environment that has the engine")
    ] = None,
    engine_args: Annotated[
        str, typer.Option(help="More arguments for the engine, such as '--max-model-len 4096'")
    ] = "",
    chains: Annotated[str, typer.Option(help="Drafts in a row for --engine, comma-separated")] = "3",
    rows: Annotated[str, typer.Option(help="Requests at once in an engine, comma-separated")] = "1,4,16,64",
    config: FileOrPreset = None,
    override: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure drafts and rivals; prints the paper's table: speed-up and τ for each benchmark and temperature.

    Example: hass evaluate .hass/store/draft/DIGEST -o report --temperatures 0,1

    Example: hass evaluate DRAFT -o report --engine vllm --chains 2,3 --rows 1,16
    """
    changes = list(override or [])
    if methods is not None:
        changes.append(f"evaluation.methods={json.dumps(methods.split(','))}")
    if benchmarks is not None:
        changes.append(f"evaluation.benchmarks={json.dumps(benchmarks.split(','))}")
    if temperatures is not None:
        changes.append(f"evaluation.temperatures=[{temperatures}]")
    own, others = split_drafts(drafts)
    chosen = settings(config or PRESET, changes)
    if own and config is None:
        chosen = with_target_of(own, chosen, changes)
    check_methods(chosen.evaluation.methods, ({HASS: own} if own else {}) | others)
    check_benchmarks(chosen.evaluation.benchmarks)
    asked = EngineOptions(server, plain_server, engine, engine_python, engine_args, chains, rows).checked(own)
    from hass_core.evaluation.evaluate import PAGE, evaluate_folder  # imports torch
    from hass_core.evaluation.terminal import terminal

    with progress_bar("evaluate") as report:
        result = evaluate_folder(
            own, chosen.target, chosen.evaluation, chosen.tree, out, chosen.evaluation.methods, others,
            asked.in_engine(), report,
        )  # fmt: skip
    if as_json:
        return show_json(result)
    console.print(terminal(result))
    show(f"report: {out.resolve() / PAGE}")


def split_drafts(given: list[str]) -> tuple[Path | None, dict[str, Path]]:
    """The draft under test, and those of other methods. Raises BadInput when two are given for one method."""
    drafts: dict[str, Path] = {}
    for entry in given:
        name, named, address = entry.partition("=")
        method, path = (name, find_draft(address)) if named else (HASS, find_draft(entry))
        if method in drafts:
            raise BadInput(f"two drafts for the method {method}: {drafts[method]} and {path}")
        drafts[method] = path
    return drafts.pop(HASS, None), drafts
