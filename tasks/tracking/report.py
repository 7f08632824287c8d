"""A retraining's page in MLflow, and what it says of the draft before: settings and results of two versions."""

from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Run

from hass_core.config import RunConfig
from tasks.tracking.client import connect, run_url
from tasks.tracking.registry import DraftVersion, found_run

PAGE = "report.html"
RESULTS = ("evaluation/speedup", "evaluation/tau_macro", "draft/best_tau", "draft/tokens_seen", "prompts/prompts")
Differences = list[tuple[str, str, str]]


def log_page(config: RunConfig, run_id: str, html: str) -> str:
    """Put the page into the retraining's run; returns where to look at it."""
    connect(config).log_text(run_id, html, PAGE)
    return page_address(config, run_id)


def page_address(config: RunConfig, run_id: str) -> str:
    """The page's address on a tracking server, else its file on this machine."""
    if url := run_url(config, run_id):
        return f"{url.partition('?')[0]}/artifacts/{PAGE}"
    folder = connect(config).get_run(run_id).info.artifact_uri or ""
    return f"{unquote(urlsplit(folder).path) if folder.startswith('file:') else folder}/{PAGE}"


def is_published(config: RunConfig, run_id: str) -> bool:
    """Whether the run has its page."""
    return any(file.path == PAGE for file in connect(config).list_artifacts(run_id))


def differences(
    client: MlflowClient, before: DraftVersion, after: DraftVersion
) -> tuple[Differences, Differences] | None:
    """Settings that differ between the runs that made two versions, and their results side by side.

    None where one of the runs is gone.
    """
    old, new = (_run_of(client, version) for version in (before, after))
    if old is None or new is None:
        return None
    names = sorted(old.data.params.keys() | new.data.params.keys())
    settings = [(name, old.data.params.get(name, ""), new.data.params.get(name, "")) for name in names]
    figures = ((name, old.data.metrics.get(name), new.data.metrics.get(name)) for name in RESULTS)
    results = [(name, _shown(before), _shown(after)) for name, before, after in figures]
    return [row for row in settings if row[1] != row[2]], [row for row in results if any(row[1:])]


def _run_of(client: MlflowClient, version: DraftVersion) -> Run | None:
    return found_run(client, client.get_model_version(version.model, version.version).run_id)


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.2f}"
