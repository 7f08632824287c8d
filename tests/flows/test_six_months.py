"""Half a year of a retraining loop: traffic grows on S3, the target changes, data arrives broken, a run is killed, a
draft serves badly, another is taken back. At the end the record is a true diary, and its numbers are right.

All is real but what tiny drafts are worth: the gains that the gate measures are written into the weeks below, and so is
the acceptance that the watch expects. `make test-recovery` runs the whole of it, `make test` its turning points.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.testing.utilities import prefect_test_harness

from flows.parameters import RejectionParameters, RunParameters
from flows.reject_draft import reject_draft
from flows.retrain import Retrained, retrain
from flows.rollback_draft import rollback_draft
from flows.watch_drafts import watch_drafts
from hass_core.config import TreeConfig
from hass_core.errors import BadInput, TrackingError
from hass_core.evaluation import duel
from hass_core.evaluation.duel import Bout
from hass_core.evaluation.metrics import Measurement
from hass_core.store import Releases, Store
from tasks import watch
from tasks.gate import _shown, judge
from tasks.resources import _loaded
from tasks.tracking.names import stage_metrics
from tasks.tracking.registry import LOGGED_MODEL
from tests.conftest import tiny_llama
from tests.evaluation.engine_server import Engine, running
from tests.flows.stack import ROOT, end, wait_for

NAME = "hass-draft-tiny"
QUESTIONS, ROUNDS, EXPECTED_TAU = 40, 3, 1.9
FAST = ["evaluation.max_new_tokens=6", "evaluation.lossless_questions=1", "training.passes=2", "promotion.rounds=3"]


@dataclass(frozen=True)
class Week:
    """What happens in it, and what the new draft's duels give."""

    event: str
    gain: float = 0.0


HALF_A_YEAR = (
    Week("new traffic", 0.1), Week("new traffic", 0.08), Week("nothing new"), Week("new traffic", 0.002),
    Week("broken data"), Week("killed", 0.06), Week("person refuses", 0.05), Week("nothing new"),
    Week("new traffic", -0.03), Week("new traffic", 0.05), Week("new target", 0.09), Week("nothing to go back to"),
    Week("nothing new"), Week("new traffic", 0.04), Week("new traffic", 0.001), Week("serves badly", 0.07),
    Week("rollback"), Week("nothing new"), Week("new traffic", 0.03), Week("new traffic", -0.01),
    Week("nothing new"), Week("new traffic", 0.05), Week("broken data"), Week("new traffic", 0.002),
    Week("new traffic", 0.06), Week("nothing new"),
)  # fmt: skip
TURNING_POINTS = (
    Week("new traffic", 0.1), Week("nothing new"), Week("broken data"), Week("killed", 0.06),
    Week("person refuses", 0.05), Week("new target", 0.09), Week("serves badly", 0.07), Week("rollback"),
)  # fmt: skip


@pytest.fixture(scope="module")
def prefect() -> Iterator[None]:
    """A Prefect server for this module."""
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def loop(prefect, s3_store, tiny_preset, monkeypatch, tmp_path) -> "Loop":
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("HASS_CACHE", str(tmp_path / "cache"))
    loop = Loop(s3_store, tiny_preset)
    monkeypatch.setattr(duel, "run_duel", loop.duel)
    monkeypatch.setattr(watch, "expected_tau", lambda report, positions: EXPECTED_TAU)
    return loop


@pytest.mark.recovery
@pytest.mark.timeout(3600)  # of a busy machine
def test_half_a_year_leaves_a_true_diary(loop):
    loop.live(HALF_A_YEAR)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_turning_points_of_half_a_year_leave_a_true_diary(loop):
    loop.live(TURNING_POINTS)


class Loop:
    """An operator's half year. `diary` is what he wrote down: version, verdict, and what it replaced."""

    def __init__(self, store: Store, preset: Path):
        self.store, self.preset, self.gain, self.week = store, preset, 0.0, 0
        self.traffic = f"{store.root}-traffic"
        self.diary: list[tuple[str, str, str | None]] = []
        self.champion: str | None = None
        text = preset.read_text()
        text = re.sub(r"^store = .*", f'store = "{store.root}"', text, flags=re.MULTILINE)
        text = re.sub(r"^files = .*", f'files = ["{self.traffic}/"]\nnewest = 40', text, flags=re.MULTILINE)
        preset.write_text(text)

    def live(self, weeks: tuple[Week, ...]) -> None:
        """One week after another; after each the record is as the diary, and nothing of before has changed."""
        for week in weeks:
            self.week, self.gain = self.week + 1, week.gain
            before = self.record()
            getattr(self, week.event.replace(" ", "_"))()
            after = self.record()
            assert {name: after[name] for name in before} == before, f"week {self.week}, {week.event}"
            self.check_diary()
        self.check_numbers()

    # what happens in a week

    def new_traffic(self) -> None:
        self.log()
        done = self.retrain()
        assert done.new
        assert done.verdict is not None
        self.note(done, done.verdict.promoted)

    def nothing_new(self) -> None:
        def everything() -> list[object]:
            return [
                [run.to_dictionary() for run in self.runs()],
                [dict(v) for v in self.client.search_model_versions()],
            ]

        before = everything()
        done = self.retrain()
        assert everything() == before
        assert not done.new
        assert done.verdict is None

    def broken_data(self) -> None:
        path = f"{self.traffic}/2026-W{self.week:02d}/requests.jsonl"
        self.store.fs.pipe_file(path, b'{"messages": [{"role": "user", "content": "cut of')
        with pytest.raises(BadInput, match=rf"W{self.week:02d}/requests.jsonl"):
            self.retrain()
        self.store.fs.rm(path)

    def killed(self) -> None:
        self.log()
        done = {manifest for manifest in self.manifests("responses")}
        command = [sys.executable, "-m", "flows.retrain", str(self.preset), *FAST]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
        try:
            wait_for(lambda: set(self.manifests("responses")) - done, "the answers", 180)
            process.send_signal(signal.SIGKILL)
        finally:
            end(process)
        assert [run.info.status for run in self.retrainings()].count("RUNNING") == 1
        done = self.retrain()  # as the automation asks for
        assert done.verdict is not None
        self.note(done, done.verdict.promoted)

    def person_refuses(self) -> None:
        self.log()
        done = self.retrain("promotion.automatic=false")
        assert done.verdict is None
        reject_draft(RejectionParameters(preset=str(self.preset), overrides=FAST, reason="the log is of a load test"))
        self.note(done, promoted=False)
        assert not self.retrain().new

    def new_target(self) -> None:
        folder = self.preset.parent / "tiny-instruct"
        tiny_llama(seed=self.week).save_pretrained(folder)
        _loaded.cache_clear()  # a flow run has a process of its own
        self.new_traffic()

    def nothing_to_go_back_to(self) -> None:
        with pytest.raises(TrackingError, match="drafts of another version of the target: nothing to go back to"):
            rollback_draft(self.parameters())

    def serves_badly(self) -> None:
        seen = []
        with running(Engine((0.6, 0.3))) as engine:
            for shares in ((0.6, 0.3), (0.2, 0.1), (0.2, 0.1)):
                engine.shares = shares
                engine.serve(500)
                rules = (f'watch.endpoints=["{engine.url}/metrics"]', "watch.readings=2")
                seen.append(watch_drafts(self.parameters(*rules)))
        assert [reading.tau for reading in seen] == pytest.approx([1.9, 1.3, 1.3])
        assert [reading.alarms for reading in seen] == [(), (), ("hass.acceptance-fell",)]
        self.new_traffic()  # by the automation; people ask other things now

    def rollback(self) -> None:
        before = self.champion
        state = rollback_draft(self.parameters(), return_state=True)
        done = state.result()
        assert state.message == str(done), "for those who see the run and no terminal"
        assert done.withdrawn.version == before
        self.champion = done.restored.version
        self.diary = [(v, "withdrawn" if v == before else verdict, old) for v, verdict, old in self.diary]
        assert not self.retrain().new, "what was taken back does not come again by itself"

    # the operator's means

    def parameters(self, *overrides: str) -> RunParameters:
        return RunParameters.model_validate({"preset": str(self.preset), "overrides": [*FAST, *overrides]})

    def retrain(self, *overrides: str) -> Retrained:
        return retrain(self.parameters('promotion.release=["vllm"]', *overrides))

    def log(self) -> None:
        """A week's requests, as a gateway writes them."""
        rows = [
            {"model": "tiny", "messages": [{"role": "user", "content": f"Tell me of week {self.week}, {n}."}]}
            for n in range(8 + self.week)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self.store.fs.pipe_file(f"{self.traffic}/2026-W{self.week:02d}/requests.jsonl", text.encode())

    def note(self, done: Retrained, promoted: bool) -> None:
        replaced = self.champion if promoted else None
        self.diary.append((done.version.version, str(promoted).lower(), replaced))
        self.champion = done.version.version if promoted else self.champion

    def duel(self, config, challenger, opponent, tree: TreeConfig, rounds, store, target, progress=None):
        """Times as the week has them; all else of a duel is in its own tests."""
        key = {"simulated": [challenger.digest, opponent and opponent.digest], "week": self.week}
        folder = store.stage(duel.STAGE, key)
        random = np.random.default_rng(self.week)
        bouts = [self.bout(lap, q, random) for lap in range(ROUNDS) for q in range(QUESTIONS)]
        with folder.writing(duel.FILE) as file:
            pq.write_table(pa.Table.from_pylist([bout.model_dump() for bout in bouts]), file.path)
        return folder.finish({"gain": self.gain})

    def bout(self, lap: int, question: int, random: np.random.Generator) -> Bout:
        def side(seconds: float) -> Measurement:
            return Measurement(
                benchmark="tiny", question=str(question), category="any", temperature=0.0, method="any",
                prompt_tokens=5, new_tokens=100, seconds=float(seconds), decode_seconds=float(seconds),
                accepted=[], drafted_depth=[], token_ids=[],
            )  # fmt: skip

        ours, theirs = np.exp(random.normal(0, 0.01, 2))
        return Bout(round=lap, challenger=side(ours / (1 + self.gain)), opponent=side(theirs))

    # what the record says

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])

    def retrainings(self) -> list[Run]:
        return [run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]

    def runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name("hass")
        return list(self.client.search_runs([experiment.experiment_id])) if experiment else []

    def record(self) -> dict[str, object]:
        """Status, times, parameters and metrics of every finished run; what a watch adds is no change of the past."""
        return {
            run.info.run_id: (
                run.info.status, run.info.start_time, run.info.end_time, run.data.params,
                {name: value for name, value in run.data.metrics.items() if not name.startswith("watch/")},
            )
            for run in self.runs()
            if run.info.status == "FINISHED"
        }  # fmt: skip

    def manifests(self, stage: str) -> list[str]:
        self.store.fs.invalidate_cache()
        return [str(path) for path in self.store.fs.glob(f"{self.store.root}/{stage}/*/manifest.json")]

    def check_diary(self) -> None:
        """The registry, read by its own words, against the operator's notes."""
        client = self.client
        versions = sorted(client.search_model_versions(f"name = '{NAME}'"), key=lambda version: int(version.version))
        told = [
            (
                str(version.version),
                client.get_run(version.run_id).data.tags["hass.promoted"],
                version.tags.get("hass.replaced"),
            )
            for version in versions
        ]
        assert told == self.diary
        assert [(run.info.run_name, run.data.tags) for run in self.runs() if run.info.status != "FINISHED"] == []
        if self.champion:
            assert client.get_model_version_by_alias(NAME, "champion").version == int(self.champion)
            release = Releases(self.store, NAME).current()
            assert release is not None

    def check_numbers(self) -> None:
        """Every metric is what the store's own stages say; every verdict follows from its duel."""
        client = self.client
        for run in self.runs():
            for stage in ("prompts", "responses", "features", "draft", "evaluation"):
                if digest := run.data.tags.get(f"hass.digest.{stage}"):
                    artifact = self.store.artifact(stage, digest)
                    assert artifact is not None
                    told = {name: value for name, value in run.data.metrics.items() if name in stage_metrics(artifact)}
                    assert told == stage_metrics(artifact), stage
        for version in client.search_model_versions(f"name = '{NAME}'"):
            model = client.get_logged_model(version.tags[LOGGED_MODEL])
            metrics = {metric.key: metric.value for metric in model.metrics or []}
            evaluation = self.store.artifact("evaluation", version.tags["hass.digest.evaluation"])
            assert evaluation is not None
            assert metrics["evaluation/tau_macro"] == stage_metrics(evaluation)["evaluation/tau_macro"]
        self.check_verdicts()
        self.check_traces()

    def check_verdicts(self) -> None:
        for path in self.manifests("duel"):
            digest = path.split("/")[-2]
            artifact = self.store.artifact("duel", digest)
            assert artifact is not None
            gain = judge(duel.read_bouts(self.store, artifact), True, self.parameters().config().promotion).gain
            assert gain is not None
            assert gain.low < artifact.summary["gain"] < gain.high or abs(gain.value - artifact.summary["gain"]) < 0.01
            shown = _shown(gain)
            descriptions = [version.description for version in self.client.search_model_versions(f"name = '{NAME}'")]
            assert [text for text in descriptions if shown in text], shown

    def check_traces(self) -> None:
        """Every retraining shows one answer, whose spans together are the answer."""
        for run in self.retrainings():
            trace = self.client.get_trace(run.data.tags["hass.trace"])
            root, *cycles = trace.data.spans
            parts = [span.outputs["accepted text"] + span.outputs["the target's own"] for span in cycles]
            assert "".join(parts) == root.outputs
            assert trace.info.trace_metadata["mlflow.sourceRun"] == run.info.run_id
