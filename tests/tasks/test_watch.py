"""The draft in use, watched at engines that tell the truth, then worse."""

import json

import pytest

from hass_core.config import TreeConfig
from hass_core.errors import BadInput, ConfigError, TrackingError
from hass_core.evaluation.report import Report, Score
from hass_core.evaluation.statistics import Estimate
from tasks import tracking, watch
from tasks.tracking import open_retraining
from tests.evaluation.engine_server import Engine, running
from tests.tasks.conftest import crowned, make_draft


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value)


@pytest.fixture
def evaluation(store):
    """An evaluation whose chain accepts 60 %, and of those half, and of those half."""
    numbers = {name: estimate(1.0) for name, field in Score.model_fields.items() if field.annotation is Estimate}
    score = Score(
        method="hass", benchmark="all", temperature=0.0, questions=1, new_tokens=1,
        acceptance_by_depth=[], acceptance_by_rank=[], **numbers,
    )  # fmt: skip
    report = Report(
        target="tiny", target_fingerprint="x", draft={}, device="cpu", dtype="float32", tree=TreeConfig(), plan=None,
        max_new_tokens=1, repeats=1, benchmarks={"a": 1}, scores=[score], comparisons=[],
        n_alpha=[estimate(0.6), estimate(0.5), estimate(0.5)], lossless=None, same_precision=None,
        generate_tokens_per_second=1.0, leak_checked=True,
    )  # fmt: skip
    folder = store.stage("evaluation", {"of": "watch test"})
    folder.write_text("report.json", report.model_dump_json())
    return folder.finish({})


@pytest.fixture
def version(config, store, prompts, tiny_target, evaluation):
    with open_retraining(config, prompts, {}) as run_id:
        draft = make_draft(store, tiny_target)
        tags = {"hass.digest.evaluation": evaluation.digest}
        return crowned(config, tracking.register(config, run_id, draft, store, tiny_target, tags))


@pytest.fixture
def alarms(monkeypatch):
    told = []
    monkeypatch.setattr(watch, "emit_event", lambda **event: told.append(event))
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
    with pytest.raises(ConfigError, match=r"watch\.endpoints is empty"):
        watch.watch_champion.fn(config)
    with running(Engine((0, 0))) as engine, pytest.raises(BadInput, match="is no Prometheus page"):
        watch.watch_champion.fn(
            config.model_copy(
                update={"watch": config.watch.model_copy(update={"endpoints": (f"{engine.url}/v1/models",)})}
            )
        )


def test_without_a_champion_there_is_nothing_to_watch(config):
    watched = config.model_copy(update={"watch": config.watch.model_copy(update={"endpoints": ("http://x",)})})
    with pytest.raises(TrackingError, match="has no champion"):
        watch.watch_champion.fn(watched)
