"""Export and its part in promotion: a draft that cannot serve is not promoted, and the reason is told."""

import json

import pytest
from safetensors.torch import load_file, save_file

from hass_core.errors import BadInput, DraftMismatch
from tasks import export, promotion, tracking
from tasks.tracking import open_retraining
from tests.tasks.conftest import make_draft


@pytest.fixture
def served(config, saved_target):
    """Settings whose target is a folder on disk."""
    target = config.target.model_copy(update={"source": str(saved_target), "dtype": "float32"})
    return config.model_copy(update={"target": target})


@pytest.fixture
def register(served, store, prompts, tiny_target):
    def call(seed: int) -> tracking.DraftVersion:
        with open_retraining(served, prompts, {}) as run_id:
            draft = make_draft(store, tiny_target, seed)
            return tracking.register(served, run_id, draft, store, tiny_target, {})

    return call


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch):
    monkeypatch.setattr(export, "create_markdown_artifact", lambda *given, **named: None)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "eagle"])
def test_a_version_is_written_for_an_engine_and_the_registry_knows(served, register, tmp_path, engine):
    version = register(0)
    done = export.export_draft.fn(served, version, engine, tmp_path / "out", "org/tiny")
    assert "org/tiny" in done.card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 48
    client = tracking.connect(served)
    assert tracking.lineage(client, version)[f"hass.export.{engine}"] == "passed"
    run = client.get_model_version(version.model, version.version).run_id
    assert [file.path for file in client.list_artifacts(run, f"export/{engine}")] == [
        f"export/{engine}/README.md",
        f"export/{engine}/config.json",
    ]


def spoil(store, version):
    """A weight that is not a number, as a training gone wrong would leave it."""
    folder = store.open(version.draft)
    path = folder.local_path("model.safetensors")
    tensors = load_file(path)
    tensors["fc.weight"][0, 0] = float("nan")
    with folder.store.stage("draft", {"spoiled": 1}).writing("model.safetensors") as file:
        save_file(tensors, file.path)
    config = folder.read_text("config.json")
    spoiled = folder.store.stage("draft", {"spoiled": 1})
    spoiled.write_text("config.json", config)
    return version.model_copy(update={"draft": spoiled.finish({}), "version": "2"})


def test_a_draft_that_cannot_serve_is_not_promoted(served, register, store):
    champion = register(0)
    challenger = spoil(store, champion)
    verdict = promotion._verdict(served, challenger, champion, again=False)
    assert not verdict.promoted
    assert len(verdict.reasons) == 3
    assert verdict.reasons[0].startswith("the export check for vllm failed: ")
    assert "fc.weight" in verdict.reasons[0]


def test_promotion_can_ask_for_fewer_engines(served, register, store):
    version = spoil(store, register(0))
    rules = served.promotion.model_copy(update={"engines": ()})
    assert export.export_objections(served.model_copy(update={"promotion": rules}), version) == ()
    assert export.export_objections(served, register(0)) == ()


def test_an_export_that_fails_its_check_leaves_nothing(served, register, store, tmp_path):
    version = spoil(store, register(0)).model_copy(update={"version": "1"})
    with pytest.raises(DraftMismatch, match=r"cannot serve under vLLM"):
        export.export_draft.fn(served, version, "vllm", tmp_path / "out", "org/tiny")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(served, register, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to mother.txt").write_text("dear")
    with pytest.raises(BadInput, match=r"holds something other than a draft; name another folder"):
        export.export_draft.fn(served, register(0), "vllm", tmp_path / "letters", "org/tiny")
    assert (tmp_path / "letters" / "to mother.txt").read_text() == "dear"
