"""Whole evaluations of random drafts on the tiny target: results, resumption, and inputs that must be refused."""

import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from hass_core.cli.draft_address import find_draft
from hass_core.config import RunConfig, TargetConfig
from hass_core.data.prompts import PROMPTS_SCHEMA
from hass_core.errors import BadInput, ConfigError, ContextTooLong, DraftMismatch, LeakedBenchmark, NonFinite
from hass_core.evaluation import evaluate
from hass_core.evaluation.evaluate import evaluate_draft, evaluate_folder, measured_by, read_report
from hass_core.evaluation.measure import Examiner
from hass_core.evaluation.metrics import Measurement
from hass_core.evaluation.report import Report
from hass_core.evaluation.terminal import terminal
from hass_core.store import Artifact, Store
from hass_core.target_model.loader import freeze
from tests.conftest import byte_tokenizer, tiny_llama
from tests.flows.names import promised_metrics, unlisted
from tests.processes import start, wait

from .conftest import TREE, random_draft


@pytest.fixture
def config(settings):
    return RunConfig(evaluation=settings, tree=TREE)


@pytest.fixture
def draft(store, draft_dir):
    """A finished draft stage, as training leaves it, whose prompts the store does not hold."""
    folder = store.stage("draft", {"made": "for a test"})
    for path in draft_dir.iterdir():
        with folder.writing(path.name) as file:
            file.path.write_bytes(path.read_bytes())
    rows = [
        {"step": s, "time": 0.0, "train/loss": 3 - s / 10, "val/accuracy_step_1": s / 40, "val/accuracy_step_2": s / 50}
        for s in range(0, 20, 5)
    ]
    folder.write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder.finish({})


@pytest.fixture
def on_tiny(monkeypatch, tiny_target):
    """`evaluate_folder` loads its target from settings; the tiny one has no folder."""
    monkeypatch.setattr(evaluate, "load_target", lambda config: tiny_target)


def changed(config, **evaluation):
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})


def test_an_evaluation_writes_its_report_for_programs_and_for_people(config, draft, store, tiny_target):
    artifact = evaluate_draft(config, draft, store, tiny_target)
    folder = store.open(artifact)
    names = set(folder.finished())
    assert names == {"report.json", "report.html", "per_question.parquet"}
    rows = pq.read_table(folder.local_path("per_question.parquet")).to_pylist()
    assert [(row["question"], row["method"]) for row in rows] == [
        (f"mine/{q}", method) for q in (1, 2, 3) for method in ("plain", "hass")
    ]
    assert Measurement.model_validate(rows[0]).new_tokens == 24  # two turns of twelve tokens


def test_the_summary_bears_the_documented_names(config, draft, store, tiny_target):
    artifact = evaluate_draft(config, draft, store, tiny_target)
    summary = artifact.summary
    assert unlisted((f"evaluation/{name}" for name in summary), promised_metrics()) == set()
    assert summary["lossless"] is True
    assert summary["speedup_low"] <= summary["speedup"] <= summary["speedup_high"]
    rows = pq.read_table(store.open(artifact).local_path("per_question.parquet")).to_pylist()
    taus = [1 + sum(row["accepted"]) / len(row["accepted"]) for row in rows if row["method"] == "hass"]
    assert summary["tau_macro"] == pytest.approx(sum(taus) / len(taus))


def test_drafted_answers_are_the_plain_answers(config, draft, store, tiny_target):
    artifact = evaluate_draft(changed(config, temperatures=(0.0, 1.0)), draft, store, tiny_target)
    rows = pq.read_table(store.open(artifact).local_path("per_question.parquet")).to_pylist()
    answers = {(r["question"], r["temperature"], r["method"]): r["token_ids"] for r in rows}
    for (question, temperature, _), tokens in answers.items():
        assert tokens == answers[question, temperature, "plain"]
    assert answers["mine/1", 0.0, "plain"] != answers["mine/1", 1.0, "plain"]


def test_a_report_survives_json(config, draft, store, tiny_target):
    report = read_report(store, evaluate_draft(config, draft, store, tiny_target))
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert report.summary() == evaluate_draft(config, draft, store, tiny_target).summary


def test_a_stopped_evaluation_continues_with_the_next_question(config, draft, store, tiny_target, monkeypatch):
    measure, asked = Examiner.measure, []

    def stopping(self, question, temperature):
        asked.append(question.id)
        if asked == ["mine/1", "mine/2"]:
            raise KeyboardInterrupt
        return measure(self, question, temperature)

    monkeypatch.setattr(Examiner, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_draft(config, draft, store, tiny_target)
    evaluate_draft(config, draft, store, tiny_target)
    assert asked[2:4] == ["mine/2", "mine/3"]  # then the chain
    before = len(asked)
    evaluate_draft(config, draft, store, tiny_target)
    assert len(asked) == before


def test_of_two_processes_with_one_evaluation_the_slower_one_finds_it_done(
    config, draft, store, tiny_target, monkeypatch
):
    examples, first = evaluate._examples, []

    def overtaken(*given):
        if not first:
            first.append(None)
            first[0] = evaluate_draft(config, draft, store, tiny_target)
        return examples(*given)

    monkeypatch.setattr(evaluate, "_examples", overtaken)
    assert evaluate_draft(config, draft, store, tiny_target) == first[0]


def test_a_planned_tree_is_measured_once_and_recorded(config, draft, store, tiny_target, monkeypatch):
    planned = config.model_copy(update={"tree": TREE.model_copy(update={"plan": True})})
    measure_all = Examiner.measure_all
    monkeypatch.setattr(Examiner, "measure_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate_draft(planned, draft, store, tiny_target)
    monkeypatch.setattr(Examiner, "measure_all", measure_all)
    monkeypatch.setattr("hass_core.evaluation.steps.make_plan", None)  # a second plan would fail
    artifact = evaluate_draft(planned, draft, store, tiny_target)
    report = read_report(store, artifact)
    assert report.plan is not None
    assert report.tree == report.plan.tree()
    assert "chosen by measuring this machine and draft" in store.open(artifact).read_text("report.html")


def test_all_six_methods_stand_in_one_table(on_tiny, tiny_target, settings, draft_dir, tmp_path):
    other = random_draft(tiny_target, tmp_path / "other", seed=1)
    methods = ["plain", "pld", "sps", "eagle", "eagle2", "hass"]
    out = tmp_path / "out"
    report = evaluate_folder(draft_dir, TargetConfig(), settings, TREE, out, methods, {"eagle2": other})
    assert report.methods == methods
    text = (out / "report.html").read_text()
    for name in ("plain", "PLD", "SpS", "EAGLE", "EAGLE-2", "HASS"):
        assert f"<td>0</td><td>{name}</td>" in text
    assert {c.other for c in report.comparisons} == {"pld", "sps", "eagle", "eagle2"}
    assert not (out / "scratch").exists()
    for method in methods:  # greedy: every method gives the target's own answer
        assert report.score(method).new_tokens == report.score("plain").new_tokens


def test_eagle2_without_a_draft_says_how_to_get_one(on_tiny, settings, draft_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"eagle2 needs a draft of its own.*align_steps=1.*folder as eagle2=DIR"):
        evaluate_folder(draft_dir, TargetConfig(), settings, TREE, tmp_path / "out", ["plain", "eagle2"])


def test_a_draft_for_a_method_that_takes_none_is_refused(on_tiny, settings, draft_dir, tmp_path):
    with pytest.raises(ConfigError, match="no method 'pld' takes a draft"):
        evaluate_folder(draft_dir, TargetConfig(), settings, TREE, tmp_path, ["pld"], {"pld": draft_dir})


def test_the_draft_of_another_target_is_refused_by_name(on_tiny, settings, tiny_target, tmp_path):
    stranger = random_draft(tiny_target, tmp_path / "stranger", target_fingerprint="0" * 16, target="elsewhere")
    with pytest.raises(DraftMismatch, match="which differs from the target tiny in its weights"):
        evaluate_folder(stranger, TargetConfig(), settings, TREE, tmp_path / "out", ["plain", "hass"])
    assert not (tmp_path / "out").exists()


def test_a_question_longer_than_the_context_is_named_at_once(config, draft, store, tiny_target, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "novel", "prompt": "x" * 600}) + "\n")
    long = changed(config, benchmarks=(str(path),))
    with pytest.raises(ContextTooLong, match=r"question long/novel of long has \d+ prompt tokens.*512 tokens of tiny"):
        evaluate_draft(long, draft, store, tiny_target)


def test_logits_that_are_not_numbers_name_method_and_question(config, draft, store, tiny_target):
    broken = copy.deepcopy(tiny_target.model)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    target = replace(freeze(broken, tiny_target.tokenizer, "tiny"), identity=tiny_target.identity)
    with pytest.raises(NonFinite, match="NaN or infinite"):
        evaluate_draft(config, draft, store, target)


def trained_on_a_question(store: Store, draft_dir: Path) -> Artifact:
    """A finished draft stage behind the stages that made it, whose prompts hold a question of `settings`."""
    prompts = store.stage("prompts", {"n": 1})
    row = {"id": "p/1", "category": "c", "source": "p", "sha256": "-"}
    row["messages"] = [{"role": "user", "content": "what is 2 + 3 ?!"}]
    with prompts.writing("prompts.parquet") as file:
        pq.write_table(pa.Table.from_pylist([row], PROMPTS_SCHEMA), file.path)
    source = prompts.finish({})
    for stage, before in (("responses", "prompts"), ("features", "responses"), ("draft", "features")):
        folder = store.stage(stage, {before: source.digest})
        if stage == "draft":
            for path in draft_dir.iterdir():
                with folder.writing(path.name) as file:
                    file.path.write_bytes(path.read_bytes())
        source = folder.finish({})
    return source


def test_a_question_that_was_trained_on_is_refused(config, store, tiny_target, draft_dir, tmp_path):
    source = trained_on_a_question(store, draft_dir)
    with pytest.raises(LeakedBenchmark, match=r"training prompt 'what is 2 \+ 3 \?!'"):
        evaluate_draft(config, source, store, tiny_target)
    folder = Path(store.root) / "draft" / source.digest  # as `hass evaluate STORE/draft/DIGEST` finds it
    with pytest.raises(LeakedBenchmark, match=r"training prompt 'what is 2 \+ 3 \?!'"):
        evaluate_folder(folder, TargetConfig(), config.evaluation, TREE, tmp_path / "out", ["plain", "hass"])
    with pytest.raises(LeakedBenchmark, match=r"training prompt 'what is 2 \+ 3 \?!'"):  # it would flatter a rival too
        evaluate_folder(
            draft_dir,
            TargetConfig(),
            config.evaluation,
            TREE,
            tmp_path / "out",
            ["plain", "eagle2"],
            {"eagle2": folder},
        )


@pytest.mark.slow
def test_a_question_that_was_trained_on_is_refused_for_a_draft_on_s3(
    config, s3_store, s3_proxy, draft_dir, tmp_path, on_tiny, monkeypatch
):
    """As `hass evaluate s3://…/draft/DIGEST` finds it: its files come into the cache, its prompts stay where they are.
    From elsewhere, or with a server that is away, they are not known, and the report says so."""
    monkeypatch.setenv("HASS_CACHE", str(tmp_path / "cache"))
    source = trained_on_a_question(s3_store, draft_dir)
    folder = find_draft(source.url)
    asked = TargetConfig(), config.evaluation, TREE, tmp_path / "out", ["plain", "hass"]
    with pytest.raises(LeakedBenchmark, match=r"training prompt 'what is 2 \+ 3 \?!'"):
        evaluate_folder(folder, *asked)
    s3_proxy.fail("500")
    report = evaluate_folder(folder, *asked)
    assert not report.leak_checked
    assert "training prompts: not known here, so not compared" in shown(report)


def shown(report: Report) -> str:
    """What the terminal shows of it."""
    console = Console(width=160, record=True, force_terminal=False)
    console.print(terminal(report))
    return console.export_text()


def test_names_with_markup_are_shown_as_they_are(config, draft, store, tiny_target):
    report = read_report(store, evaluate_draft(config, draft, store, tiny_target))
    name = "[bold]x|y[/]"
    scores = [s.model_copy(update={"benchmark": s.benchmark.replace("mine", name)}) for s in report.scores]
    odd = report.model_copy(update={"benchmarks": {name: 3}, "scores": scores})
    assert "[bold]x|y[/]" in shown(odd)


def test_a_broken_question_file_stops_the_stage_at_once(config, draft, store, tiny_target, questions_file):
    questions_file.write_text("{}\n")
    with pytest.raises(BadInput, match=r"mine\.jsonl, line 1: expected one of the keys"):
        evaluate_draft(config, draft, store, tiny_target)


def evaluate_up_to_a_kill(config: str, draft: str, store: str, threads: int) -> None:
    """In a process of its own, which ends before the second question."""

    def kill(done, total, note=""):
        if note == "question mine/2":
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(threads)  # the key names the machine, threads included
    target = freeze(tiny_llama(), byte_tokenizer(), name="tiny")
    settings, made = RunConfig.model_validate_json(config), Artifact.model_validate_json(draft)
    evaluate_draft(settings, made, Store(store), target, kill)


def test_a_killed_process_leaves_its_finished_questions_to_the_next(config, draft, store, tiny_target, monkeypatch):
    given = config.model_dump_json(), draft.model_dump_json(), store.root, torch.get_num_threads()
    assert wait(start(evaluate_up_to_a_kill, *given)) == -signal.SIGKILL
    measure, asked = Examiner.measure, []
    monkeypatch.setattr(Examiner, "measure", lambda self, q, t: (asked.append(q.id), measure(self, q, t))[1])
    evaluate_draft(config, draft, store, tiny_target)
    assert asked[:2] == ["mine/2", "mine/3"]


def test_results_from_before_drafts_could_skip_the_begin_of_prompts_are_found_again(tiny_target, settings):
    now = measured_by(settings, TREE, tiny_target, [])
    assert now["tree"] == TREE.model_dump(exclude={"prompt_tokens"})
    ends = measured_by(settings, TREE.model_copy(update={"prompt_tokens": 64}), tiny_target, [])
    assert ends["tree"]["prompt_tokens"] == 64
