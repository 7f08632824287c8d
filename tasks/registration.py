"""Registration: the evaluated draft becomes a version in the model registry."""

from prefect import task
from prefect.artifacts import create_markdown_artifact

from hass_core.config import RunConfig
from hass_core.evaluation.evaluate import read_report
from hass_core.store import Artifact
from hass_core.store.housekeeping import note_registered
from hass_core.store.provenance import code_commit
from tasks import tracking
from tasks.model_card import model_card
from tasks.resources import store_of, target_of
from tasks.retries import SHORT


@task(name="register-draft", **SHORT)
def register_draft(config: RunConfig, stages: list[Artifact], run_id: str) -> tracking.DraftVersion:
    """The stages of one retraining, prompts to evaluation → the draft's version, with the way back to each of them."""
    by_name = {artifact.stage: artifact for artifact in stages}
    lineage = {f"hass.digest.{name}": artifact.digest for name, artifact in by_name.items()}
    lineage |= {f"hass.url.{name}": artifact.url for name, artifact in by_name.items()}
    lineage |= {"hass.commit": code_commit() or "unknown", "hass.mlflow_run": run_id}
    draft, store, target = by_name["draft"], store_of(config), target_of(config)
    evaluation = read_report(store, by_name["evaluation"])
    card = model_card(config, target, by_name, evaluation)
    version = tracking.register(config, run_id, draft, store, target, lineage, card, evaluation)
    note_registered(store, version.model, version.version, stages)
    text = (
        f"`{version.model}` version {version.version}, alias `{version.alias}`. MLflow: `{tracking.ui_command(config)}`"
    )
    create_markdown_artifact(text, key="registered-draft", description="The draft in the model registry")
    return version
