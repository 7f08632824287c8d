"""Export a draft: `python -m flows.export_draft [PRESET] [source=…] [engine=vllm] [section.key=value …]`."""

from functools import partial
from pathlib import Path

from prefect import flow
from rich.console import Console
from rich.markdown import Markdown

from flows.parameters import ExportParameters
from flows.terminal import main
from hass_core.config import RunConfig
from tasks.export import Exported, find_draft
from tasks.export import export_draft as export
from tasks.retries import SHORT_SECONDS
from tasks.stage_lines import told


@flow(name="export-draft", flow_run_name="export-draft {run.preset} for {run.engine}", timeout_seconds=SHORT_SECONDS)
def export_draft(run: ExportParameters) -> Exported:
    """Write a draft as an engine loads it, check it, and say how to serve it."""
    config = run.config()
    source = find_draft(config, run.source)
    out = Path("exports", run.folder or f"{source.short_name}-{run.engine}").resolve()
    work = partial(export, config, source, run.engine, out, run.served_as)
    return told("export", work, lambda done: f"{source} for {run.engine}, every check passed")


def show(console: Console, config: RunConfig, done: Exported) -> None:
    """The card, with the command that serves the draft, and where it is."""
    console.print(Markdown(done.card))
    console.print(f"written to {done.folder}; it passed every check", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(export_draft, show)
