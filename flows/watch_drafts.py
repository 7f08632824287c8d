"""Read how the draft in use does: `python -m flows.watch_drafts [PRESET] watch.endpoints='["http://…/metrics"]'`."""

from prefect import flow

from flows.outcome import completed
from flows.parameters import RunParameters
from flows.terminal import main
from tasks.watch import Watched, watch_champion


@flow(name="watch-drafts", flow_run_name="watch-drafts {run.preset}", timeout_seconds=1800)
def watch_drafts(run: RunParameters) -> Watched:
    """One reading of the engines' acceptance; the event hass.acceptance-fell when it has been low for long."""
    done = watch_champion(run.config())
    return completed(done, str(done))


if __name__ == "__main__":
    main(watch_drafts, lambda console, config, done: console.print(str(done), highlight=False))
