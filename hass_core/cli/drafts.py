"""`hass export` and `hass import`: drafts in and out."""

from typing import Annotated

import typer

from hass_core.cli.common import show, show_json
from hass_core.cli.draft_address import target_of
from hass_core.cli.options import AsJson, Draft, Out, TargetSource
from hass_core.config import Engine, TreeConfig
from hass_core.settings import validated


def export(
    draft: Draft,
    engine: Annotated[Engine, typer.Option(help="The engine that will serve it")],
    out: Out,
    target: TargetSource = None,
    served_as: Annotated[
        str | None, typer.Option(help="The target as the engine knows it, for the command; default: its folder or id")
    ] = None,
    steps: Annotated[int, typer.Option(help="Draft tokens per cycle")] = 3,
    top_k: Annotated[int, typer.Option(help="Branches per node; 1 = a chain")] = 1,
    nodes: Annotated[int | None, typer.Option(help="Tokens verified at once, root included")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a draft the way one serving engine loads it, and check it.

    Example: hass export .hass/store/draft/DIGEST --engine vllm -o served
    """
    nodes = steps + 1 if nodes is None else nodes
    shape = {"kind": "dynamic" if top_k > 1 else "chain", "depth": steps, "top_k": top_k, "nodes": nodes}
    tree = validated(TreeConfig, shape, "the draft tree")
    from hass_core.export.folders import check_out

    check_out(out, draft)
    from hass_core.draft_model.engines import ENGINES
    from hass_core.draft_model.files import read_config
    from hass_core.export.card import method_of, serving_command
    from hass_core.export.exporter import TOKEN_MAP, export_draft
    from hass_core.target_model.licence import target_licence
    from hass_core.target_model.loader import load_target

    loaded = load_target(target_of(draft, target).model_copy(update={"device": "cpu"}))
    served_as = served_as or loaded.folder
    licence = target_licence(target_of(draft, target))
    export_draft(draft, loaded, engine, out, tree, served_as, licence)
    mapped = (out / TOKEN_MAP).is_file()
    method = method_of(read_config(out))
    command = serving_command(ENGINES[engine], tree, served_as, str(out.resolve()), mapped, method)
    if as_json:
        return show_json({"folder": out, "engine": engine, "command": command})
    show(f"wrote {out}; it passed every check. To serve it:")
    show(command)


def import_(
    source: Draft,
    out: Out,
    target: TargetSource = None,
    fold_bias: Annotated[bool, typer.Option(help="Move fc.bias into the draft's own embedding, for vLLM")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring in an existing EAGLE, EAGLE-2, HASS or EAGLE-3 checkpoint (safetensors or a plain .bin of tensors).

    Example: hass import EAGLE-llama3 -t meta-llama/Meta-Llama-3-8B-Instruct -o imported
    """
    from hass_core.export.folders import check_out

    check_out(out, source)
    from hass_core.export import importer
    from hass_core.target_model.loader import load_target

    loaded = load_target(target_of(source, target).model_copy(update={"device": "cpu"}))
    importer.import_draft(source, loaded, out)
    folding = importer.fold_bias(out, loaded, out) if fold_bias else None
    if as_json:
        return show_json({"folder": out, "folding": folding})
    if folding:
        show(f"folded fc.bias: condition number {folding.condition:.2e}, relative error {folding.relative_error:.1e}")
    show(f"wrote {out}; to measure it: hass evaluate {out} -o REPORT; to train on: draft.warm_start={out}")
