"""What stands in the record now, for who watches the pipeline: the last run of each stage, and the drafts in use."""

from collections.abc import Iterable, Iterator

from mlflow import MlflowClient
from pydantic import BaseModel

from hass_core.config import RunConfig
from tasks.tracking.client import connect, experiment_id
from tasks.tracking.registry import CHAMPION, found_run
from tasks.tracking.runs import FINISHED

PAGE = 100


class StageRecord(BaseModel, frozen=True):
    """The run of a stage that finished last."""

    stage: str
    ended: float  # Unix time
    seconds: float
    numbers: dict[str, float]  # `draft/steps`, …


class ChampionRecord(BaseModel, frozen=True):
    """A draft in use."""

    model: str
    version: int
    registered: float  # Unix time
    numbers: dict[str, float]  # of the retraining that made it, and `watch/…` of its service


def last_stages(config: RunConfig, stages: Iterable[str]) -> list[StageRecord]:
    """One record for each stage that has ever finished."""
    client = connect(config)
    experiment = experiment_id(client, config)
    found = []
    for stage in stages:
        wanted = f"tags.`hass.stage` = '{stage}' and attributes.status = '{FINISHED}'"
        newest = client.search_runs([experiment], wanted, order_by=["attributes.end_time DESC"], max_results=1)
        for run in newest:
            began, ended = run.info.start_time / 1000, (run.info.end_time or run.info.start_time) / 1000
            found.append(StageRecord(stage=stage, ended=ended, seconds=ended - began, numbers=dict(run.data.metrics)))
    return found


def champion_records(config: RunConfig) -> list[ChampionRecord]:
    """The champion of every registered draft; models that are none of ours are passed over."""
    return list(_champions(connect(config)))


def _champions(client: MlflowClient) -> Iterator[ChampionRecord]:
    token = None
    while True:
        page = client.search_registered_models(max_results=PAGE, page_token=token)
        for model in page:
            if CHAMPION in model.aliases:
                version = client.get_model_version(model.name, model.aliases[CHAMPION])
                if "hass.digest.draft" in version.tags:
                    run = found_run(client, version.run_id)
                    yield ChampionRecord(
                        model=model.name,
                        version=int(version.version),
                        registered=version.creation_timestamp / 1000,
                        numbers=dict(run.data.metrics) if run else {},
                    )
        token = page.token
        if not token:
            return
