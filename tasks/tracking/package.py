"""Pack a draft as an MLflow model: a Hugging Face style folder plus a few lines of code, no pickle."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.utils.time import get_current_time_millis

import hass_core
from hass_core.config import RunConfig
from hass_core.evaluation.report import Report
from hass_core.export.exporter import is_draft_file
from hass_core.store import Artifact, Store
from hass_core.target_model.loader import Target
from tasks.tracking.client import connect, experiment_id

SERVING_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "pyarrow",
    "fsspec",
    "pydantic",
    "numpy",
    "gguf",
)

PACKAGED = "package:"  # begins a target that is a GGUF inside a PyPI package

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema([ParamSpec("max_new_tokens", "integer", 128), ParamSpec("temperature", "float", 0.0)]),
)
INPUT_EXAMPLE = ["What is the capital of France?"]


def log_draft_model(
    config: RunConfig,
    run_id: str,
    draft: Artifact,
    store: Store,
    target: Target,
    scratch: Path,
    card: str = "",
    evaluation: Report | None = None,
) -> LoggedModel:
    """Log the draft with the code that decodes with it, as `evaluation` measured it, and with what that found.

    `scratch` takes the folder while it is uploaded.

    In steps, because `mlflow.pyfunc.log_model` would load the target a second time to try the input example.
    """
    client = connect(config)
    folder = store.open(draft).copied(scratch / "draft", is_draft_file)
    (folder / "served.json").write_text(json.dumps(_served(config, evaluation), indent=2))
    (folder / "README.md").write_text(card)
    about = {"target": target.name, "target_fingerprint": target.fingerprint, "draft": draft.digest}
    logged = client.create_logged_model(
        experiment_id(client, config), name="draft", source_run_id=run_id, tags=about, model_type="speculative-draft",
        params=_parameters(config),
    )  # fmt: skip
    pyfunc.save_model(
        path=str(scratch / "model"),
        python_model=str(Path(__file__).with_name("served_draft.py")),
        artifacts={"draft": str(folder)},
        code_paths=[str(_code(scratch))],
        signature=SIGNATURE,
        input_example=INPUT_EXAMPLE,
        pip_requirements=requirements(config),
        metadata=about,
        mlflow_model=Model(model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id),
    )
    client.log_model_artifacts(logged.model_id, str(scratch / "model"))
    _log_metrics(client, run_id, logged.model_id, evaluation)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY")


def _code(scratch: Path) -> Path:
    """The package that decodes, without the draft that comes with it."""
    source = Path(hass_core.__file__).parent
    left_out = shutil.ignore_patterns("__pycache__", "drafts")
    return shutil.copytree(source, scratch / source.name, ignore=left_out)


def requirements(config: RunConfig) -> list[str]:
    """What the package index has of what decoded here: without the local part of a version, such as torch's +cpu."""
    packages = [*SERVING_PACKAGES]
    if config.target.source.startswith(PACKAGED):
        packages.append(config.target.source.removeprefix(PACKAGED))
    return [f"{name}=={version(name).partition('+')[0]}" for name in packages]


def _served(config: RunConfig, evaluation: Report | None) -> dict[str, Any]:
    """Target, tree and type to decode with: those that were measured."""
    tree = evaluation.tree if evaluation else config.tree
    target = config.target.model_dump(mode="json")
    return {
        "target": target | ({"dtype": evaluation.dtype} if evaluation else {}),
        "tree": tree.model_dump(mode="json"),
    }


def _parameters(config: RunConfig) -> dict[str, str]:
    """The settings by which people tell drafts apart."""
    sections = config.model_dump(mode="json", include={"draft", "training", "tree"})
    return {f"{section}.{name}": str(value) for section, values in sections.items() for name, value in values.items()}


def _log_metrics(client: MlflowClient, run_id: str, model_id: str, evaluation: Report | None) -> None:
    """The evaluation's numbers as the model's own: the Models tab compares versions by them."""
    now = get_current_time_millis()
    summary = evaluation.summary() if evaluation else {}
    numbers = {f"evaluation/{name}": round(float(value), 4) for name, value in summary.items()}
    client.log_batch(
        run_id, metrics=[Metric(name, value, now, 0, model_id=model_id) for name, value in numbers.items()]
    )
