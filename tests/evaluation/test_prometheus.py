"""Acceptance read from a Prometheus server that scrapes two engines: Debian's, or the one that HASS_PROMETHEUS names.

Without either the server's answer is given by hand, in the form that the real one was seen to give.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hass_core.errors import BadInput, Unreachable
from hass_core.evaluation.engine_metrics import read_prometheus
from tests.evaluation.engine_server import Engine, running
from tests.flows.stack import answers, end, free_port, wait_for
from tests.loopback import answering

PROMETHEUS = os.environ.get("HASS_PROMETHEUS") or shutil.which("prometheus")


@pytest.fixture
def engines() -> Iterator[tuple[Engine, Engine]]:
    with running(Engine((0.6, 0.3))) as first, running(Engine((0.2, 0.1))) as second:
        first.serve(1000)
        second.serve(500)
        yield first, second


@pytest.fixture
def server(engines, tmp_path: Path) -> Iterator[str]:
    """A Prometheus server that reads both every second."""
    targets = [engine.url.removeprefix("http://") for engine in engines]
    jobs = [
        {"job_name": name, "static_configs": [{"targets": [target]}], "scrape_interval": "1s"}
        for name, target in zip(("first", "second"), targets, strict=True)
    ]
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": jobs}))  # JSON is YAML
    url = f"127.0.0.1:{free_port()}"
    places = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(PROMETHEUS), *places, f"--web.listen-address={url}"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: answers(f"http://{url}/-/ready"), "Prometheus", 60)
        yield f"http://{url}"
    finally:
        end(process)


@pytest.mark.skipif(not PROMETHEUS, reason="apt install prometheus")
def test_a_prometheus_server_tells_what_each_engine_counts(server, engines):
    def seen() -> dict[str, float]:
        try:
            return {name: read.drafts for name, read in read_prometheus(server).items()}
        except BadInput:  # not scraped yet
            return {}

    instances = [engine.url.removeprefix("http://") for engine in engines]
    wait_for(lambda: seen() == dict(zip(instances, (1000, 500), strict=True)), "both engines' counts", 30)
    first = read_prometheus(server, 'job="first"')
    assert list(first) == [instances[0]]
    assert first[instances[0]].tau == pytest.approx(1.9)
    engines[0].serve(200)
    wait_for(lambda: read_prometheus(server, 'job="first"')[instances[0]].drafts == 1200, "the new count", 30)
    with pytest.raises(BadInput, match=r"knows no engine that drafts: .*job=\"third\".*; check watch.selector"):
        read_prometheus(server, 'job="third"')
    with pytest.raises(BadInput, match="does not answer as a Prometheus server"):
        read_prometheus(server, "job=")


def one(name: str, value: int, **labels: str) -> dict:
    """A series with its newest value."""
    return {"metric": {"__name__": name, "instance": "a:8000", **labels}, "value": [1764000000.1, str(value)]}


def test_its_answer_is_read_by_instance():
    accepted = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    series = [one(accepted, 600, position="0"), one(accepted, 300, position="1")]
    series += [one("vllm:spec_decode_num_drafts_total", 1000), one("hass_cycles_total", 0, instance="b:8001")]

    answer = json.dumps({"data": {"resultType": "vector", "result": series}})
    with answering(200, answer) as address:
        found = read_prometheus(f"{address}/")
    assert {name: read.tau for name, read in found.items()} == {"a:8000": pytest.approx(1.9), "b:8001": None}


def test_a_server_that_is_none_is_named():
    with running(Engine((0, 0))) as engine, pytest.raises(BadInput, match="does not answer as a Prometheus server"):
        read_prometheus(engine.url)


def test_engines_of_two_models_are_not_added_up():
    drafts = "vllm:spec_decode_num_drafts_total"
    series = [one(drafts, 9, model_name="ours"), one(drafts, 5, model_name="theirs", instance="b:8000")]
    refused = pytest.raises(BadInput, match=r"several models \(ours, theirs\): pick one by watch.selector")
    with answering(200, json.dumps({"data": {"result": series}})) as address, refused:
        read_prometheus(address)


def test_a_server_that_is_away_is_named():
    with pytest.raises(Unreachable, match=r"http://127.0.0.1:\d+ cannot be read: .*; check that Prometheus runs"):
        read_prometheus(f"http://127.0.0.1:{free_port()}")
