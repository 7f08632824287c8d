"""Go back to the champion before: `python -m flows.rollback_draft [PRESET] [section.key=value …]`."""

from functools import partial

from prefect import flow

from flows.outcome import completed
from flows.parameters import RunParameters
from flows.terminal import main
from tasks.promotion import RolledBack, roll_back
from tasks.release import release_champion
from tasks.retries import SHORT_SECONDS
from tasks.stage_lines import told


@flow(name="rollback-draft", flow_run_name="rollback-draft {run.preset}", timeout_seconds=SHORT_SECONDS)
def rollback_draft(run: RunParameters) -> RolledBack:
    """Withdraw the champion; the one it replaced is the champion again, and released again where releases are made."""
    config = run.config()
    done = told("rollback", partial(roll_back, config), lambda done: f"version {done.restored.version} is back")
    release_champion(config)
    return completed(done, str(done))


if __name__ == "__main__":
    main(rollback_draft, lambda console, config, done: console.print(str(done), highlight=False))
