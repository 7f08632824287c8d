"""Pack a draft as an MLflow model: a Hugging Face style folder plus a few lines of code, no pickle."""

import json
from importlib.metadata import version
from pathlib import Path

from mlflow import pyfunc
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

import hass_core
from hass_core.config import RunConfig
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

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema([ParamSpec("max_new_tokens", "integer", 128), ParamSpec("temperature", "float", 0.0)]),
)
INPUT_EXAMPLE = ["What is the capital of France?"]


def log_draft_model(
    config: RunConfig, run_id: str, draft: Artifact, store: Store, target: Target, scratch: Path, card: str = ""
) -> LoggedModel:
    """Log the draft with the code that decodes with it. `scratch` takes the folder while it is uploaded.

    In steps, because `mlflow.pyfunc.log_model` would load the target a second time to try the input example.
    """
    client = connect(config)
    folder = store.open(draft).copied(scratch / "draft", is_draft_file)
    served = {"target": config.target.model_dump(mode="json"), "tree": config.tree.model_dump(mode="json")}
    (folder / "served.json").write_text(json.dumps(served, indent=2))
    (folder / "README.md").write_text(card)
    about = {"target": target.name, "target_fingerprint": target.fingerprint, "draft": draft.digest}
    logged = client.create_logged_model(
        experiment_id(client, config), name="draft", source_run_id=run_id, tags=about, model_type="speculative-draft"
    )
    pyfunc.save_model(
        path=str(scratch / "model"),
        python_model=str(Path(__file__).with_name("served_draft.py")),
        artifacts={"draft": str(folder)},
        code_paths=[str(Path(hass_core.__file__).parent)],
        signature=SIGNATURE,
        input_example=INPUT_EXAMPLE,
        pip_requirements=[f"{name}=={version(name)}" for name in SERVING_PACKAGES],
        metadata=about,
        mlflow_model=Model(model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id),
    )
    client.log_model_artifacts(logged.model_id, str(scratch / "model"))
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY")
