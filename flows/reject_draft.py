"""Refuse a draft that waits: `python -m flows.reject_draft [PRESET] [version=N] [reason=…] [section.key=value …]`."""

from prefect import flow
from rich.console import Console

from flows.outcome import completed
from flows.parameters import RejectionParameters
from flows.terminal import main
from hass_core.config import RunConfig
from tasks.promotion import find_version, reject
from tasks.retries import SHORT_SECONDS
from tasks.tracking import DraftVersion


@flow(name="reject-draft", flow_run_name="reject-draft {run.preset}", timeout_seconds=SHORT_SECONDS)
def reject_draft(run: RejectionParameters) -> DraftVersion:
    """Take a registered draft out of the running; promote-draft with its number can bring it back."""
    config = run.config()
    done = reject(config, find_version(config, run.version), run.reason)
    return completed(done, told(done))


def told(done: DraftVersion) -> str:
    """What was refused."""
    return f"version {done.version} of {done.model} is refused"


def show(console: Console, config: RunConfig, done: DraftVersion) -> None:
    """The same, in the terminal."""
    console.print(told(done), highlight=False)


if __name__ == "__main__":
    main(reject_draft, show)
