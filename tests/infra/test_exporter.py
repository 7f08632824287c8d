"""The pipeline's page for Prometheus tells what MLflow and the store hold, and which source is silent."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prometheus_client import CollectorRegistry, generate_latest

from infra.exporter import PipelineMetrics, servers
from tasks import tracking
from tests.flows.stack import ROOT, answers, end, free_port, wait_for
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
        for read in servers(PipelineMetrics(registry), config).values():
            read()
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


def test_a_store_that_dies_takes_its_numbers_with_it_and_no_others(
    config, tracking_database, s3_store, s3_proxy, caplog
):
    config = config.model_copy(update={"store": s3_store.root})
    s3_store.stage("draft", {"of": "the exporter"}).finish({})
    registry = CollectorRegistry()
    readers = servers(PipelineMetrics(registry), config)

    def read() -> str:
        s3_store.fs.invalidate_cache()
        readers["store"]()
        return generate_latest(registry).decode()

    readers["mlflow"]()
    assert value(read(), 'hass_store_folders{finished="true",stage="draft"}') == 1
    s3_proxy.fail("500")
    caplog.clear()
    page = [read(), read()][-1]
    assert "hass_store_folders" not in samples([page]), "not 0 either, as if the store were empty"
    assert value(page, 'hass_source_up{source="store"}') == 0
    assert value(page, 'hass_source_up{source="stages"}') == 1
    s3_proxy.mode = "pass"
    assert value(read(), 'hass_store_folders{finished="true",stage="draft"}') == 1
    away, back = caplog.messages
    assert away.startswith(f"store: cannot read from the store {s3_store.root}: ")
    assert f"AWS_ENDPOINT_URL (http://127.0.0.1:{s3_proxy.port})" in away
    assert back == "store: answers again"


def test_servers_that_are_away_or_silent_are_named_and_keep_no_other_number_waiting(tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text(f'name = "tiny"\nstore = "{tmp_path}/store"\n')
    port, mlflow = free_port(), f"http://127.0.0.1:{free_port()}"
    page = f"http://127.0.0.1:{port}/metrics"
    with socket.create_server(("127.0.0.1", 0)) as silent, (tmp_path / "log").open("wb") as log:
        prefect = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        exporter = subprocess.Popen(
            [sys.executable, "-m", "infra.exporter", "--port", str(port), "--preset", str(settings), "--seconds", "1"],
            cwd=ROOT, env=os.environ | {"PREFECT_API_URL": prefect, "MLFLOW_TRACKING_URI": mlflow},
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            wait_for(lambda: answers(page), "the exporter", 60)
            wait_for(lambda: 'hass_source_errors_total{source="prefect"}' in httpx.get(page).text, "Prefect", 60)
            shown = httpx.get(page).text
        finally:
            end(exporter)
    assert value(shown, 'hass_source_up{source="store"}') == 1
    assert value(shown, 'hass_source_errors_total{source="stages"}') > 1, "asked again while Prefect was silent"
    told = (tmp_path / "log").read_text().splitlines()
    assert len(told) == 3
    assert {line.partition(" does not answer")[0] for line in told} == {
        f"prefect: Prefect at {prefect}", f"stages: MLflow at {mlflow}", f"champions: MLflow at {mlflow}"
    }  # fmt: skip
