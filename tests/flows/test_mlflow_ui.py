"""Two retrainings in MLflow's own pages, in a browser: what sets them apart is seen without looking for it.

Needs Debian's `chromium` and `pip install playwright`; skipped without them.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from infra.stack.servers import WITHOUT_JOBS
from tests.flows.stack import ROOT, answers, end, free_port, wait_for

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = [
    pytest.mark.recovery,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="apt install chromium"),
]
WAIT_MS = 60_000


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """An MLflow server's address."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = [f"--backend-store-uri=sqlite:///{tmp_path}/server.db", f"--artifacts-destination={tmp_path}/artifacts"]
    with (tmp_path / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *places], env=os.environ | WITHOUT_JOBS, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: answers(f"{address}/health"), "the MLflow server", 120)
        yield address
    finally:
        end(process)


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of a headless browser."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # which root needs
        page = browser.new_page(viewport={"width": 1600, "height": 1400})
        page.set_default_timeout(WAIT_MS)
        yield page
        browser.close()


def retrain(server: str, home: Path, preset: Path, *overrides: str) -> str:
    """Retrain; the address that it prints for looking at the runs."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": server, "PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "flows.retrain", str(preset), *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"runs and figures: (\S+)", done.stdout)[0]


def retrainings(server: str) -> list[Run]:
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("hass")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


def select(page: Any, run: Run) -> None:
    row = page.locator(".ag-row", has_text=run.info.run_name).first
    row.get_by_role("checkbox").first.check(force=True)


def test_the_table_and_the_comparison_show_results_and_the_settings_that_differ(server, page, tiny_preset, tmp_path):
    retrain(server, tmp_path / "prefect", tiny_preset)
    link = retrain(server, tmp_path / "prefect", tiny_preset, "training.passes=6", "training.align_steps=1")
    runs = retrainings(server)
    assert len(runs) == 2

    page.goto(link)
    page.get_by_text(runs[0].info.run_name).first.wait_for()
    for column in ("evaluation/speedup", "evaluation/tau_macro", "training.align_steps"):
        page.get_by_text(column, exact=True).wait_for()
    shown = page.locator(".ag-center-cols-container").inner_text().split()
    for run in runs:
        assert f"{run.data.metrics['evaluation/tau_macro']:g}" in shown
        assert run.data.params["training.align_steps"] in shown

    page.get_by_role("button", name="Close").first.click()  # the assistant's panel
    for run in runs:
        select(page, run)
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Comparing 2 Runs").wait_for()
    page.get_by_label("Show diff only").first.click(force=True)  # of the parameters
    page.get_by_role("row", name="training.passes").wait_for()
    differing = page.get_by_role("row", name=re.compile(r"^[a-z]+\.[a-z_]+\b")).all_inner_texts()
    names = {text.split()[0] for text in differing if not text.startswith(("hass.", "prefect."))}
    assert names == {"training.passes", "training.align_steps"}
    shown = page.locator("body").inner_text().split()
    assert "draft/best_tau" in shown
    assert {f"{round(run.data.metrics['draft/best_tau'], 3):g}" for run in runs} <= set(shown)
    champion_and_challenger_are_compared_under_models(server, page, runs)


def champion_and_challenger_are_compared_under_models(server: str, page: Any, runs: list[Run]) -> None:
    """Two versions, ticked in the Models tab: their settings that differ, and the results of each."""
    page.goto(f"{server}/#/models/hass-draft-tiny")
    for row in ("Version 1", "Version 2"):
        page.get_by_role("row", name=row).get_by_role("checkbox").check(force=True)
    page.get_by_test_id("compareButton").click()
    page.get_by_text("Comparing 2 Versions").wait_for()
    page.get_by_role("row", name="training.align_steps").wait_for()
    # a time, for two tiny drafts may well have the same τ, and what is equal is not shown
    row = page.get_by_role("row", name="evaluation/tokens_per_second").first.inner_text().split()
    measured = {f"{run.data.metrics['evaluation/tokens_per_second']:.4g}" for run in runs}
    assert set(row[1:]) == measured
