"""Export a draft: `python -m flows.export_draft [PRESET] [source=…] [engine=vllm] [section.key=value …]`."""

from pathlib import Path

from prefect import flow
from pydantic import Field
from rich.console import Console
from rich.markdown import Markdown

from flows.parameters import RunParameters
from flows.terminal import main
from hass_core.config import Engine, RunConfig
from tasks.export import Exported, find_draft
from tasks.export import export_draft as export


class ExportParameters(RunParameters):
    """Which draft, for which engine, and where to."""

    source: str | None = Field(
        default=None,
        min_length=1,
        description="models:/NAME@ALIAS, models:/NAME/VERSION, a version's number, or a folder (STORE/draft/DIGEST); "
        "empty = the champion",
    )
    engine: Engine = Field(default="vllm", description="The engine that will serve it")
    folder: str | None = Field(
        default=None, pattern=r"^\w[\w.-]*$", description="Its name below exports/; empty = DRAFT-ENGINE"
    )
    served_as: str | None = Field(default=None, description="The target's name at the engine, for the command")


@flow(name="export-draft", flow_run_name="export-draft {run.preset} for {run.engine}")
def export_draft(run: ExportParameters) -> Exported:
    """Write a draft as an engine loads it, check it, and say how to serve it."""
    config = run.config()
    source = find_draft(config, run.source)
    out = Path("exports", run.folder or f"{source.short_name}-{run.engine}").resolve()
    return export(config, source, run.engine, out, run.served_as)


def show(console: Console, config: RunConfig, done: Exported) -> None:
    """The card, with the command that serves the draft, and where it is."""
    console.print(Markdown(done.card))
    console.print(f"written to {done.folder}; it passed every check", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(export_draft, show, ExportParameters)
