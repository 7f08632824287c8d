"""The draft in use, watched at engines that tell the truth, then worse."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hass_core.data.conversations import Record
from hass_core.data.prompts import PROMPTS_SCHEMA
from hass_core.errors import BadInput, ConfigError, TrackingError
from tasks import tracking, watch
from tasks.tracking import open_retraining
from tests.evaluation.engine_server import Engine, running
from tests.tasks.conftest import crowned, make_draft, make_evaluation

TALK = (
    "What is rain?",
    "Why is the sky blue?",
    "Name a river in Europe.",
    "How do I bake bread?",
    "Tell me of the sea.",
)


@pytest.fixture
def evaluation(store):
    """An evaluation whose chain accepts 60 %, and of those half, and of those half."""
    return make_evaluation(store, (0.6, 0.5, 0.5))


@pytest.fixture
def version(config, store, prompts, tiny_target, evaluation):
    with open_retraining(config, prompts, {}) as run_id:
        draft = make_draft(store, tiny_target)
        tags = {"hass.digest.evaluation": evaluation.digest}
        return crowned(config, tracking.register(config, run_id, draft, store, tiny_target, tags))


@pytest.fixture
def alarms(monkeypatch, told):
    monkeypatch.setattr(watch, "create_markdown_artifact", lambda *given, **named: None)
    return told


def watching(config, *engines, **rules):
    endpoints = tuple(f"{engine.url}/metrics" for engine in engines)
    return config.model_copy(update={"watch": config.watch.model_copy(update={"endpoints": endpoints, **rules})})


def test_a_good_draft_raises_no_alarm_and_its_tau_stands_at_its_version(config, version, alarms):
    with running(Engine((0.6, 0.3))) as engine:
        for _ in range(4):
            engine.serve(500)
            seen = watch.watch_champion.fn(watching(config, engine))
    assert (seen.tau, seen.expected) == (pytest.approx(1.9), pytest.approx(1 + 0.6 + 0.3 + 0.15))
    assert seen.low_in_a_row == 0
    assert alarms == []
    client = tracking.connect(config)
    found = client.get_model_version(version.model, version.version)
    assert client.get_run(found.run_id).data.metrics["watch/tau"] == pytest.approx(1.9)
    logged = {metric.key for metric in client.get_logged_model(found.tags["hass.logged_model"]).metrics}
    assert {"watch/tau", "watch/expected_tau"} <= logged


def test_a_fall_that_lasts_raises_one_alarm(config, version, alarms):
    with running(Engine((0.6, 0.3))) as engine:
        config = watching(config, engine, readings=2)
        for shares in ((0.6, 0.3), (0.2, 0.0), (0.6, 0.3), (0.2, 0.0), (0.2, 0.0), (0.2, 0.0)):
            engine.shares = shares
            engine.serve(500)
            watch.watch_champion.fn(config)
    assert [event["event"] for event in alarms] == ["hass.acceptance-fell"]
    assert alarms[0]["resource"]["prefect.resource.id"] == f"hass.draft.{version.model}"
    assert alarms[0]["payload"]["readings"] == 2
    assert json.dumps(alarms[0]["payload"])


def test_too_few_drafts_say_nothing_and_are_counted_with_the_next(config, version, alarms):
    with running(Engine((0.6, 0.3))) as engine:
        config = watching(config, engine, min_drafts=200)
        engine.serve(500)
        assert watch.watch_champion.fn(config).tau is not None
        engine.serve(150)
        assert watch.watch_champion.fn(config).tau is None
        engine.serve(150)
        assert watch.watch_champion.fn(config).drafts == 300


def test_what_cannot_be_watched_is_told(config, version):
    with pytest.raises(ConfigError, match=r"nothing to watch: give watch\.endpoints"):
        watch.watch_champion.fn(config)
    with running(Engine((0, 0))) as engine, pytest.raises(BadInput, match="is no Prometheus page"):
        watch.watch_champion.fn(
            config.model_copy(
                update={"watch": config.watch.model_copy(update={"endpoints": (f"{engine.url}/v1/models",)})}
            )
        )


@pytest.fixture
def trained_on(store):
    """Prompts of a year ago: traffic, and what the target wrote itself."""
    rows = [Record(f"log-{n}", "log", "log.jsonl", question(f"{TALK[n % 5]} ({n})")) for n in range(100)]
    rows += [Record(f"own-{n}", "own", "self-written", question(f"def f{n}(x): return x")) for n in range(100)]
    folder = store.stage("prompts", {"of": "watch test, traffic"})
    with folder.writing("prompts.parquet") as file:
        pq.write_table(pa.Table.from_pylist([row_of(record) for record in rows], PROMPTS_SCHEMA), file.path)
    return folder.finish({})


def test_traffic_that_drifts_raises_one_alarm(config, store, prompts, tiny_target, trained_on, alarms, tmp_path):
    with open_retraining(config, prompts, {}) as run_id:
        tags = {"hass.digest.prompts": trained_on.digest}
        version = crowned(
            config, tracking.register(config, run_id, make_draft(store, tiny_target), store, tiny_target, tags)
        )
    log = tmp_path / "log.jsonl"
    config = config.model_copy(update={"watch": config.watch.model_copy(update={"traffic": (str(log),), "newest": 60})})

    def logged(texts):
        with log.open("a") as file:
            file.writelines(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in texts)

    logged(f"{TALK[n % 5]} ({1000 + n})" for n in range(60))
    seen = watch.watch_champion.fn(config)
    assert seen.alarms == ()
    assert seen.drift.distance < 1.5 * seen.drift.by_chance
    logged(f"SELECT {n} FROM orders WHERE total > {n};" for n in range(60))
    assert watch.watch_champion.fn(config).alarms == ("hass.traffic-drifted",)
    assert watch.watch_champion.fn(config).alarms == (), "it is quiet for a week"
    assert [event["event"] for event in alarms] == ["hass.traffic-drifted"]
    run = tracking.connect(config).get_model_version(version.model, version.version).run_id
    assert tracking.connect(config).get_run(run).data.metrics["watch/traffic_distance"] > 0.1


def question(text):
    return ({"role": "user", "content": text},)


def row_of(record):
    return {
        "id": record.id, "category": record.category, "source": record.source, "messages": list(record.messages),
        "extras": None, "sha256": "",
    }  # fmt: skip


def test_without_a_champion_there_is_nothing_to_watch(config):
    watched = config.model_copy(update={"watch": config.watch.model_copy(update={"endpoints": ("http://x",)})})
    with pytest.raises(TrackingError, match="has no champion"):
        watch.watch_champion.fn(watched)
