"""The registered model, loaded by MLflow alone in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hass_core.config import parse_config
from hass_core.target_model.loader import load_target
from tasks import tracking
from tasks.tracking import open_retraining
from tests.tasks.conftest import crowned, make_draft


@pytest.fixture
def champion(config, store, prompts, saved_target) -> tracking.DraftVersion:
    settings = config.model_dump(mode="json") | {"target": {"source": str(saved_target), "dtype": "float32"}}
    settings["tree"] = {"depth": 2, "top_k": 2, "nodes": 5}
    config = parse_config(settings)
    target = load_target(config.target)
    with open_retraining(config, prompts, {}) as run_id:
        return crowned(config, tracking.register(config, run_id, make_draft(store, target), store, target, {}))


def predict(tmp_path: Path, config, version: tracking.DraftVersion, prompts: list[str], params: dict) -> list[str]:
    """What a user without this checkout does: load by alias, predict."""
    code = (
        "import json, sys, mlflow\n"
        "uri, model, prompts, params = json.loads(sys.argv[1])\n"
        "mlflow.set_tracking_uri(uri)\n"
        "loaded = mlflow.pyfunc.load_model(f'models:/{model}@champion')\n"
        "print(json.dumps(list(loaded.predict(prompts, params))))\n"
    )
    argument = json.dumps([config.tracking.uri, version.model, prompts, params])
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, argument], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_champion_answers_as_the_target_alone_would(config, champion, saved_target, tmp_path):
    prompts = ["hello", "what is up"]
    answers = predict(tmp_path, config, champion, prompts, {"max_new_tokens": 12})
    target = load_target(parse_config({"target": {"source": str(saved_target), "dtype": "float32"}}).target)
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = target.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        plain = target.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = plain[0, inputs["input_ids"].shape[1] :]
        assert answer == target.tokenizer.decode(new, skip_special_tokens=True)
