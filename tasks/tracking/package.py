"""Pack a draft as an MLflow model: a Hugging Face style folder plus a few lines of code, no pickle."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

import hass_core
from hass_core.config import RunConfig
from hass_core.store import Artifact, Store
from hass_core.target.loader import Target
from tasks.tracking.client import as_default, tracking_uri

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
NOT_SERVED = ("metrics.jsonl", "checkpoint-")

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "prompt")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema([ParamSpec("max_new_tokens", "integer", 128), ParamSpec("temperature", "float", 0.0)]),
)


def log_draft_model(
    config: RunConfig, run_id: str, draft: Artifact, store: Store, target: Target, scratch: Path
) -> ModelInfo:
    """Log the draft with the code that decodes with it. `scratch` takes the folder while it is uploaded."""
    folder = collect_draft(draft, store, scratch / "draft")
    served = {"target": config.target.model_dump(mode="json"), "tree": config.tree.model_dump(mode="json")}
    (folder / "served.json").write_text(json.dumps(served, indent=2))
    with as_default(tracking_uri(config)), mlflow.start_run(run_id=run_id):
        return mlflow.pyfunc.log_model(
            name="draft",
            python_model=str(Path(__file__).with_name("served_draft.py")),
            artifacts={"draft": str(folder)},
            code_paths=[str(Path(hass_core.__file__).parent)],
            signature=SIGNATURE,
            input_example={"prompt": ["What is the capital of France?"]},
            pip_requirements=[f"{name}=={version(name)}" for name in SERVING_PACKAGES],
            metadata={"target": target.name, "target_fingerprint": target.fingerprint, "draft": draft.digest},
        )


def collect_draft(draft: Artifact, store: Store, folder: Path) -> Path:
    """Copy the draft's model files into one local folder."""
    stage = store.open(draft)
    manifest = stage.manifest()
    assert manifest is not None
    folder.mkdir(parents=True)
    for name in manifest.files:
        if not name.startswith(NOT_SERVED):
            shutil.copyfile(stage.local_path(name), folder / name)
    return folder
