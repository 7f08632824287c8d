"""The pipeline's page for Prometheus tells what MLflow and the store hold, and which source is silent."""

import time

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prometheus_client import CollectorRegistry, generate_latest

from infra.exporter import PipelineMetrics, refresh_all
from tasks import tracking
from tests.infra.dashboard import samples
from tests.tasks.conftest import config, crowned, draft, prompts, tracking_database

__all__ = ["config", "draft", "prompts", "tracking_database"]


@pytest.fixture
def page(config, store, prompts, draft, tiny_target) -> str:
    """After a retraining whose draft became the champion, with Prefect away."""
    with tracking.open_retraining(config, prompts, {}) as run_id:
        made = draft.model_copy(update={"summary": {**draft.summary, "tokens_per_second": 1234.0}})
        with tracking.stage_run(config, run_id, "draft") as run:
            run.record(store, made, {"prompts": prompts})
        client = tracking.connect(config)
        client.log_metric(run_id, "evaluation/tau_macro", 2.5)
        version = crowned(config, tracking.register(config, run_id, draft, store, tiny_target, {}))
    tracking.record_watch(client, version, tracking.WatchState(), {"tau": 2.25})
    store.stage("features", {"of": "a stage that has not ended"}).write_text("half.txt", "12345")
    registry = CollectorRegistry()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        refresh_all(PipelineMetrics(registry), config, with_store=True)
    return generate_latest(registry).decode()


def value(page: str, sample: str) -> float:
    (line,) = [line for line in page.splitlines() if line.startswith(f"{sample} ")]
    return float(line.rpartition(" ")[2])


def test_the_page_tells_of_stages_the_champion_and_the_store(page, config, store, draft):
    model = config.tracking.registered_model
    assert value(page, f'hass_champion_version{{model="{model}"}}') == 1
    assert value(page, f'hass_champion_tau{{model="{model}"}}') == 2.5
    assert value(page, f'hass_champion_served_tau{{model="{model}"}}') == 2.25
    assert value(page, 'hass_stage_tokens_per_second{stage="draft"}') == 1234
    assert 0 <= value(page, 'hass_stage_seconds{stage="draft"}') < 600
    assert abs(value(page, 'hass_stage_finished_timestamp_seconds{stage="draft"}') - time.time()) < 600
    manifest = store.open(draft).manifest()
    files = sum(file.bytes for file in manifest.files.values())
    assert value(page, 'hass_store_bytes{finished="true",stage="draft"}') > files
    assert value(page, 'hass_store_folders{finished="false",stage="features"}') == 1


def test_a_source_that_is_away_is_told_and_its_numbers_are_absent(page):
    assert value(page, 'hass_source_up{source="prefect"}') == 0
    assert value(page, 'hass_source_errors_total{source="prefect"}') == 1
    assert "hass_flow_runs" not in samples([page])
    assert all(value(page, f'hass_source_up{{source="{source}"}}') == 1 for source in ("stages", "champions", "store"))
