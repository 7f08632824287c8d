"""Export and its part in promotion: a draft that cannot serve is not promoted, and the reason is told."""

import json
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from hass_core.config import TargetConfig
from hass_core.errors import BadInput, ConfigError, CorruptFile, DraftMismatch, TrackingError
from hass_core.export import exporter
from tasks import export, promotion, tracking
from tasks.export import DraftSource
from tests.conftest import byte_tokenizer, tiny_llama
from tests.tasks.conftest import register_draft


@pytest.fixture
def served(config, saved_target):
    """Settings whose target is a folder on disk."""
    target = config.target.model_copy(update={"source": str(saved_target), "dtype": "float32"})
    return config.model_copy(update={"target": target})


@pytest.fixture
def register(served, store, prompts, tiny_target):
    return partial(register_draft, served, store, prompts, tiny_target)


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch):
    monkeypatch.setattr(export, "create_markdown_artifact", lambda *given, **named: None)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "eagle"])
def test_a_version_is_written_for_an_engine_and_the_registry_knows(served, register, tmp_path, engine):
    version = register(0)
    done = export.export_draft.fn(served, DraftSource(version=version), engine, tmp_path / "out", "org/tiny")
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
    assert len(verdict.reasons) == 2  # vLLM and SGLang: what every draft of draft.family = auto loads in
    assert verdict.reasons[0].startswith("the export check for vllm failed: ")
    assert "fc.weight" in verdict.reasons[0]


def test_promotion_can_ask_for_fewer_engines(served, register, store):
    version = spoil(store, register(0))
    rules = served.promotion.model_copy(update={"engines": ()})
    assert export.export_objections(served.model_copy(update={"promotion": rules}), version) == ()
    assert export.export_objections(served, register(0)) == ()


def test_engines_that_no_draft_of_these_settings_loads_in_are_told_before_a_retraining(config, tmp_path):
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    tiny_llama(rope_parameters=scaled | {"original_max_position_embeddings": 128}).save_pretrained(tmp_path / "scaled")
    byte_tokenizer().save_pretrained(tmp_path / "scaled")
    target = TargetConfig(source=str(tmp_path / "scaled"), dtype="float32", device="cpu")

    def check(**rules):
        asked = {"target": target, "promotion": config.promotion.model_copy(update=rules)}
        promotion.check_promotion.fn(config.model_copy(update=asked))

    check()  # the default: whatever the target's family is
    for setting in ("engines", "release"):
        with pytest.raises(ConfigError, match=rf'promotion\.{setting} names eagle, .* no place for rope_type "llama3"'):
            check(**{setting: ("eagle",)})
    check(engines=("eagle",), automatic=False)


def test_an_export_that_fails_leaves_no_folder_and_the_version_says_why(served, register, store, tmp_path):
    source = DraftSource(version=spoil(store, register(0)).model_copy(update={"version": "1"}))
    with pytest.raises(DraftMismatch, match=r"fc.weight holds NaN"):
        export.export_draft.fn(served, source, "vllm", tmp_path / "exports" / "out", "org/tiny")
    assert list((tmp_path / "exports").iterdir()) == []
    tags = tracking.lineage(tracking.connect(served), source.version)
    assert tags["hass.export.vllm"].startswith("failed: the draft ")
    assert "fc.weight" in tags["hass.export.vllm"]


def test_a_failure_that_nobody_foresaw_leaves_no_folder_either(served, register, tmp_path, monkeypatch):
    def full(*given, **named):
        raise OSError("no space left on device")

    monkeypatch.setattr(exporter, "save_file", full)
    source = DraftSource(version=register(0))
    with pytest.raises(OSError, match="no space left"):
        export.export_draft.fn(served, source, "vllm", tmp_path / "exports" / "out", None)
    assert list((tmp_path / "exports").iterdir()) == []
    tags = tracking.lineage(tracking.connect(served), source.version)
    assert tags["hass.export.vllm"] == "failed: no space left on device"


def test_a_draft_is_found_by_address_number_folder_or_not_named_at_all(served, register, store):
    first, second = register(0), register(1)
    name = first.model
    found = [
        export.find_draft.fn(served, named) for named in (None, f"models:/{name}@champion", f"models:/{name}/1", "1")
    ]
    assert found == [DraftSource(version=first)] * 4
    assert export.find_draft.fn(served, f"models:/{name}@challenger").version == second
    assert export.find_draft.fn(served, "some/folder/").folder == "some/folder"


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("models:/nobody@champion", "nobody has no champion"),
        ("models:/nobody/3", "nobody has no version 3"),
        ("models:/nobody", "has another form than models:/NAME@ALIAS and models:/NAME/VERSION"),
    ],
)
def test_an_address_that_leads_nowhere_is_told(served, named, told):
    with pytest.raises(TrackingError, match=told):
        export.find_draft.fn(served, named)


@pytest.mark.parametrize("in_store", [True, False])
def test_a_folder_is_exported_too(served, store, draft, tmp_path, in_store):
    folder = draft.url
    if not in_store:
        folder = str(store.open(draft).copied(tmp_path / "copy", exporter.is_draft_file))
    done = export.export_draft.fn(served, DraftSource(folder=folder), "vllm", tmp_path / "out", None)
    assert done.source.short_name == folder.rpartition("/")[2]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "Licence of the target, which applies to the draft too: not stated." in done.card


def test_a_folder_that_is_none_is_told(served, tmp_path):
    with pytest.raises(CorruptFile, match=r"nowhere/config.json is missing: a draft is a folder with config.json"):
        export.export_draft.fn(served, DraftSource(folder=f"{tmp_path}/nowhere"), "vllm", tmp_path / "out", None)


def test_a_folder_with_something_else_in_it_is_left_alone(served, register, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to mother.txt").write_text("dear")
    source = DraftSource(version=register(0))
    with pytest.raises(BadInput, match=r"something other than a former export or import; name another folder"):
        export.export_draft.fn(served, source, "vllm", tmp_path / "letters", "org/tiny")
    assert (tmp_path / "letters" / "to mother.txt").read_text() == "dear"
