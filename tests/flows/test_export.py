"""`python -m flows.export_draft` as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from hass_core.config import load_config
from hass_core.store import Store
from tasks import tracking
from tests.flows.stack import ROOT
from tests.tasks.conftest import crowned, make_draft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def version(tiny_preset, tiny_target) -> tracking.DraftVersion:
    """An untrained draft in the preset's store and registry."""
    config = load_config(str(tiny_preset), [])
    store = Store(config.store)
    prompts = store.stage("prompts", {"of": "export test"}).finish({})
    with tracking.open_retraining(config, prompts, {}) as run_id:
        return crowned(
            config, tracking.register(config, run_id, make_draft(store, tiny_target), store, tiny_target, {})
        )


def export(preset: Path, prefect_api: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environment |= {
        "PREFECT_HOME": str(preset.parent / "prefect"),
        "PREFECT_API_URL": prefect_api,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, "-m", "flows.export_draft", str(preset), *arguments],
        cwd=preset.parent, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_draft_is_exported_by_its_alias_and_a_failure_is_told_and_recorded(tiny_preset, prefect_api, version):
    done = export(
        tiny_preset, prefect_api, f"source=models:/{version.model}@champion", "engine=sglang", "target.license=mit"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tiny_preset.parent / "exports" / f"{version.model}-1-sglang"
    assert f"written to {out}; it passed every check" in done.stdout
    assert "applies to the draft too: mit." in (out / "README.md").read_text()

    weights = Path(version.draft.url) / "model.safetensors"
    broken = tiny_preset.parent / "broken"
    broken.mkdir()
    tensors = load_file(weights)
    tensors["fc.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_bytes((weights.parent / "config.json").read_bytes())
    done = export(tiny_preset, prefect_api, f"source={broken}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: the draft in {broken} cannot be taken as it is: fc.weight holds NaN" in done.stderr
    assert list((tiny_preset.parent / "exports").iterdir()) == [out]

    client = MlflowClient(f"sqlite:///{tiny_preset.parent}/.hass/mlflow.db")
    assert client.get_model_version(version.model, "1").tags["hass.export.sglang"] == "passed"
