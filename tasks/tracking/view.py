"""How MLflow's UI shows the experiment: its pages for model training, and a saved view whose columns are what matters.

A saved view is a tag of the experiment, in the form in which the UI writes it ("Views", "Save as new view"). The table
without a view shows neither metrics nor settings.
"""

import json

from mlflow import MlflowClient
from mlflow.entities import Experiment

KEY = "retrainings"
MODEL_TRAINING = "workflowType=machine_learning"  # without it the UI opens its pages for language model applications
VIEW = f"{MODEL_TRAINING}&viewStateShareKey={KEY}"
COLUMNS = {
    "metrics": ("evaluation/speedup", "evaluation/tau_macro", "evaluation/lossless", "draft/best_tau"),
    "params": ("training.align_steps", "training.passes"),
    "tags": ("hass.promoted",),
}


def experiment_tags() -> dict[str, str]:
    """The tags that tell the UI."""
    widths = {f"{kind}.`{name}`": 30 + 6 * len(name) for kind, names in COLUMNS.items() for name in names}  # in pixels
    state = {"selectedColumns": list(widths), "columnOrder": list(widths), "columnWidths": widths}
    view = {"name": "Retrainings", "createdAt": 0, "state": json.dumps(state)}
    return {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{KEY}": json.dumps(view)}


def add_view(client: MlflowClient, experiment: Experiment) -> None:
    """Set the tags that the experiment lacks."""
    for name, value in experiment_tags().items():
        if name not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, name, value)
