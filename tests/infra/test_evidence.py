"""The scripts of infra/evidence end in one sentence where a server, a file or a program that they need is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hass_core.errors import ConfigError
from infra.evidence.engines import named
from infra.evidence.load import tracking_history
from tests.evaluation.engine_server import Engine, running
from tests.flows.stack import ROOT, free_port
from tests.loopback import answering


def told(*command: str, **environment: str) -> list[str]:
    """What a script that ends with 2 says."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_engines_that_are_away_or_have_no_name_are_told():
    url = f"http://127.0.0.1:{free_port()}"
    (line,) = told("-m", "infra.evidence.engines", f"chain3={url}", "--benchmarks", "none.jsonl", "--out", "none")
    assert line.startswith(f"error: no server answers at {url}: ")
    with pytest.raises(ConfigError, match=f"'{url}' is no NAME=URL, such as plain=http"):
        named(url)


def test_engines_stand_side_by_side_with_intervals_over_questions_and_rounds(tmp_path):
    questions, record = tmp_path / "mine.jsonl", tmp_path / "record.json"
    questions.write_text(
        "".join(f'{{"question_id": {n}, "category": "any", "turns": ["Why {n}?"]}}\n' for n in range(6))
    )
    with running(Engine(None, 0.004)) as plain, running(Engine((0.5, 0.25), 0.001)) as drafted:
        command = ["-m", "infra.evidence.engines", f"plain={plain.url}", f"chain3={drafted.url}"]
        asked = ["--benchmarks", str(questions), "--rounds", "2", "--tokens", "8", "--out", str(record)]
        subprocess.run([sys.executable, *command, *asked], cwd=ROOT, check=True)
    results = json.loads(record.read_text())["results"]
    assert {name: found["chain3"]["units"] for name, found in results.items()} == {
        "1 at a time, T = 0": 6, "1 at a time, T = 1": 6, "4 at a time, T = 0": 2,
        "16 at a time, T = 0": 2, "64 at a time, T = 0": 2, "64 at a time, T = 1": 2,
    }  # fmt: skip
    for found in results.values():
        assert found["chain3"]["tau"]["value"] == pytest.approx(1.75)
        assert found["chain3"]["over_first"]["value"] == pytest.approx(
            found["chain3"]["tokens_per_second"]["value"] / found["plain"]["tokens_per_second"]["value"]
        )
        assert "tau" not in found["plain"]


def test_mapping_shards_looks_at_the_prefect_server_that_is_named(tmp_path):
    with answering(401) as url:
        (line,) = told(
            "-m", "infra.evidence.small_flow", "2", "0", PREFECT_API_URL=f"{url}/api", PREFECT_HOME=str(tmp_path)
        )  # fmt: skip
    assert line.startswith(f"error: Prefect at {url}/api refuses this machine")


def test_vllm_s_speed_needs_a_request_its_folders_and_vllm(tmp_path):
    script, request = "infra/evidence/vllm_speed.py", tmp_path / "request.json"
    assert told(script, str(request))[-1].endswith(f"there is no file {request}")
    request.write_text(f'{{"target": "{tmp_path}", "draft": null}}')
    assert f"{tmp_path}, which {request} names, is no model's folder" in told(script, str(request))[-1]
    Path(tmp_path, "config.json").write_text("{}")
    assert "has no vllm" in told(script, str(request))[-1]


def test_what_fills_a_history_of_mlflow_never_fills_the_team_s(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert tracking_history(tmp_path, 6)["versions"] == 1
    assert (tmp_path / "mlflow.db").is_file()
