"""A finished store made by hand from a tiny random draft: what the stages leave behind, without running them."""

from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hass_core.config import RunConfig, TreeConfig, parse_config
from hass_core.draft_model.architecture import DraftArchitecture
from hass_core.draft_model.checkpoint import draft_info, save_draft
from hass_core.draft_model.head import DraftHead
from hass_core.draft_model.layers import DraftModel
from hass_core.evaluation.report import Report, Score
from hass_core.evaluation.statistics import Estimate
from hass_core.store import Artifact, Store
from hass_core.target_model.loader import Target
from tasks import tracking


@pytest.fixture(scope="session")
def tracking_database(tmp_path_factory) -> str:
    """One SQLite file for all tests: making its tables takes seconds. Each test has its own experiment."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def config(store, tracking_database) -> RunConfig:
    tracking = {"uri": tracking_database, "experiment": uuid4().hex, "registered_model": f"draft-{uuid4().hex}"}
    return parse_config({"name": "test", "store": store.root, "tracking": tracking})


@pytest.fixture
def prompts(store) -> Artifact:
    folder = store.stage("prompts", {"of": "tracking test"})
    with folder.writing("prompts.parquet") as file:
        pq.write_table(pa.table({"id": ["1"], "category": ["any"]}), file.path)
    return folder.finish({"prompts": 12, "skipped": 1, "sources": "builtin"})


@pytest.fixture(autouse=True)
def told(monkeypatch) -> list[dict]:
    """The events that Prefect would have got."""
    events: list[dict] = []
    monkeypatch.setattr("tasks.events.emit_event", lambda **event: events.append(event))
    return events


def make_draft(store: Store, target: Target, seed: int = 0) -> Artifact:
    """An untrained draft as the training stage would store it."""
    torch.manual_seed(seed)
    architecture = DraftArchitecture.from_target_config(target.model.config)
    model, head = DraftModel(architecture, target.embedding), DraftHead.from_target(target.head, None)
    folder = store.stage("draft", {"seed": seed})
    scratch = folder.scratch() / "draft"
    save_draft(scratch, model, head, draft_info(target))
    for name in ("config.json", "model.safetensors"):
        with folder.writing(name) as file:
            file.path.write_bytes((scratch / name).read_bytes())
    folder.write_text("metrics.jsonl", metrics_text(range(10, 40, 10)))
    return folder.finish({"steps": 30, "val/tau": 1.5 + seed})


def make_evaluation(store: Store, n_alpha: Sequence[float]) -> Artifact:
    """An evaluation as its stage would store it, whose chain has this n-α."""
    numbers = {name: estimate(1.0) for name, field in Score.model_fields.items() if field.annotation is Estimate}
    score = Score(
        method="hass", benchmark="all", temperature=0.0, questions=1, new_tokens=1,
        acceptance_by_depth=[], acceptance_by_rank=[], **numbers,
    )  # fmt: skip
    report = Report(
        target="tiny", target_fingerprint="x", draft={}, device="cpu", dtype="float32", tree=TreeConfig(), plan=None,
        max_new_tokens=1, repeats=1, benchmarks={"a": 1}, scores=[score], comparisons=[],
        n_alpha=[estimate(share) for share in n_alpha], lossless=None, same_precision=None,
        generate_tokens_per_second=1.0, leak_checked=True,
    )  # fmt: skip
    folder = store.stage("evaluation", {"n_alpha": list(n_alpha)})
    folder.write_text("report.json", report.model_dump_json())
    return folder.finish({"lossless": True})


def estimate(value: float) -> Estimate:
    """An estimate without doubt."""
    return Estimate(value=value, low=value, high=value)


def crowned(config: RunConfig, version: tracking.DraftVersion) -> tracking.DraftVersion:
    """The version as champion, if there is none yet: what the gate does with a first draft."""
    client = tracking.connect(config)
    if tracking.champion(client, version.model) is None:
        tracking.crown(client, version, None)
    return tracking.find_version(client, version.model, int(version.version))


def register_draft(config: RunConfig, store: Store, prompts: Artifact, target: Target, seed: int):
    """An untrained draft in the registry, as champion if there is none yet."""
    with tracking.open_retraining(config, prompts, {}) as run_id:
        draft = make_draft(store, target, seed)
        return crowned(config, tracking.register(config, run_id, draft, store, target, {}))


def metrics_text(steps: range) -> str:
    """Lines as the training writes them."""
    return "".join(f'{{"step": {s}, "time": {1.7e9 + s}, "train/loss": {1 / s}}}\n' for s in steps)


@pytest.fixture
def draft(store, tiny_target) -> Artifact:
    return make_draft(store, tiny_target)


@pytest.fixture
def saved_target(tiny_target, tmp_path) -> Path:
    """The tiny target as a folder that `load_target` reads."""
    folder = tmp_path / "tiny-instruct"
    tiny_target.model.save_pretrained(folder)
    tiny_target.tokenizer.save_pretrained(folder)
    return folder
