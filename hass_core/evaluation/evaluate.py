"""The evaluation stage: what a draft is worth on questions it has never seen, and that it changes no output.

In: a trained draft. Out: report.json, report.html and per_question.parquet (a Measurement per row).
Everything that can be wrong with the input is found before anything is measured; measured questions survive a crash.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hass_core.config import EvaluationConfig, RunConfig, TargetConfig, TreeConfig
from hass_core.data.rendering import template_date
from hass_core.draft_model.accounting import read_draft
from hass_core.draft_model.files import CONFIG, RANKS, VOCABULARY, WEIGHTS
from hass_core.draft_model.identity import draft_identity
from hass_core.evaluation.benchmarks import Question, assert_unseen, assert_unseen_by_folder, load_benchmarks
from hass_core.evaluation.examples import Example, choose_examples
from hass_core.evaluation.in_engine import InEngine
from hass_core.evaluation.measure import device_name
from hass_core.evaluation.method_names import HASS, check_methods
from hass_core.evaluation.metrics import Measurement
from hass_core.evaluation.page import Part, page
from hass_core.evaluation.report import Report
from hass_core.evaluation.steps import Evaluation
from hass_core.progress import Progress, no_progress
from hass_core.sampling import DRAWS_VERSION
from hass_core.store import Artifact, StageFolder, Store, digest_of
from hass_core.store.content import content_of
from hass_core.target_model.loader import Target, load_target
from hass_core.training.metrics import read_metrics

STEP_VERSION = 5  # 4: every shape is warmed, temperatures come one after the other; 5: the version of torch counts
REPORT, PAGE, MEASURED = "report.json", "report.html", "per_question.parquet"


def evaluate_draft(
    config: RunConfig, draft: Artifact, store: Store, target: Target, progress: Progress = no_progress
) -> Artifact:
    """Measure `draft` on the questions of `config.evaluation`.

    Raises BadInput, LeakedBenchmark, ContextTooLong, ConfigError or DraftMismatch before anything slow.
    """
    questions = load_benchmarks(config.evaluation)
    folder = store.stage("evaluation", _key(config, draft, target, questions))
    if done := folder.artifact():
        return done
    seen = assert_unseen(questions, store, draft)
    source = store.open(draft)
    drafts = {HASS: local_draft(source)}
    work = Evaluation(target, questions, drafts, config.evaluation, config.tree, seen, folder.scratch())
    report, measured = work.run(progress)
    with TemporaryDirectory(prefix="hass-evaluation-") as outputs:  # scratch goes when another process is first
        for path in _write(work, report, measured, _training_metrics(source), Path(outputs)):
            with folder.writing(path.name) as file:
                file.path.write_bytes(path.read_bytes())
    return folder.finish(report.summary())


def evaluate_folder(
    draft_dir: Path | None,
    target_config: TargetConfig,
    evaluation_config: EvaluationConfig,
    tree_config: TreeConfig,
    out_dir: Path,
    methods: Sequence[str],
    drafts: Mapping[str, Path] | None = None,
    engine: InEngine | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Measure the draft in a folder, and rivals, without a store; results go into `out_dir`.

    `drafts` names further drafts by method (`eagle2`, `sps`); `engine` asks the same questions of serving engines.
    After a crash the same call continues. Raises as `evaluate_draft` does, and as the engines do.
    """
    given = ({HASS: draft_dir} if draft_dir else {}) | dict(drafts or {})
    settings = EvaluationConfig.model_validate(evaluation_config.model_dump() | {"methods": tuple(methods)})
    check_methods(settings.methods, given)
    questions = load_benchmarks(settings)
    seen = {method: assert_unseen_by_folder(questions, folder) for method, folder in given.items()}
    target = load_target(target_config)
    if engine:
        engine.where.check(target, questions[0], settings.temperatures)
    scratch, contents = out_dir / "scratch", {name: _content(name, folder, target) for name, folder in given.items()}
    identity = {"drafts": contents, **measured_by(settings, tree_config, target, questions)}
    known = seen.get(HASS, False)
    work = Evaluation(target, questions, given, settings, tree_config, known, scratch / digest_of(identity))
    report, measured = work.run(progress)
    if engine:
        report = engine.added_to(report, measured, questions, target, draft_dir, settings, progress)
    _write(work, report, measured, [], out_dir)
    shutil.rmtree(scratch)
    return report


def read_report(store: Store, evaluation: Artifact) -> Report:
    """The report of a finished evaluation stage."""
    return Report.model_validate_json(store.open(evaluation).read_text(REPORT))


def read_examples(config: RunConfig, store: Store, evaluation: Artifact, target: Target) -> list[Example]:
    """Answers of a finished evaluation, cycle by cycle: those with the highest, the median and the lowest τ."""
    with store.open(evaluation).open(MEASURED) as file:
        measured = [Measurement.model_validate(row) for row in pq.read_table(file).to_pylist()]
    return _examples(read_report(store, evaluation), measured, load_benchmarks(config.evaluation), target)


def stored_page(
    config: RunConfig,
    store: Store,
    draft: Artifact,
    evaluation: Artifact,
    target: Target,
    first: Sequence[Part],
    verdict: str,
    last: Sequence[Part],
) -> str:
    """The page of a finished evaluation with what a retraining adds to it; see `page`."""
    report, examples = read_report(store, evaluation), read_examples(config, store, evaluation, target)
    return page(report, examples, _training_metrics(store.open(draft)), first, verdict, last)


def _examples(
    report: Report, measured: Sequence[Measurement], questions: Sequence[Question], target: Target
) -> list[Example]:
    def decode(token_ids: list[int]) -> str:
        return str(target.tokenizer.decode(token_ids, skip_special_tokens=True))

    return choose_examples(measured, questions, report.main_method, decode)


def local_draft(folder: StageFolder) -> Path:
    """The local folder that holds a draft stage's files."""
    manifest = folder.manifest()
    assert manifest is not None
    paths = [folder.local_path(name) for name in (CONFIG, WEIGHTS, VOCABULARY, RANKS) if name in manifest.files]
    folder.note_origin()
    return paths[0].parent


def _write(
    done: Evaluation, report: Report, measured: list[Measurement], training: list[dict[str, Any]], folder: Path
) -> list[Path]:
    """All files of an evaluation, written into a local folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in (REPORT, PAGE, MEASURED)]
    examples = _examples(report, measured, done.questions, done.target)
    files[0].write_text(report.model_dump_json(indent=2), encoding="utf-8")
    files[1].write_text(page(report, examples, training), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([m.model_dump() for m in measured]), files[2])
    return files


def _content(method: str, folder: Path, target: Target) -> str | list[str]:
    """A name for a draft's content; `sps` drafts with a whole small model, told by its files."""
    if method == "sps":
        return [content_of(file) for file in (folder / CONFIG, folder / WEIGHTS) if file.is_file()]
    return draft_identity(read_draft(folder, target))


def _key(config: RunConfig, draft: Artifact, target: Target, questions: Sequence[Question]) -> dict[str, Any]:
    return {"draft": draft.digest, **measured_by(config.evaluation, config.tree, target, questions)}


def measured_by(
    config: EvaluationConfig, tree: TreeConfig, target: Target, questions: Sequence[Question]
) -> dict[str, Any]:
    """What decides a measurement, beside the drafts: questions, settings, tree, target, machine, and torch: its kernels
    are half of a speed. Other versions are recorded only (see store/provenance.py)."""
    return {
        "evaluation": config.model_dump(mode="json", exclude={"benchmarks"}),
        # where it is not set, results from before there was such a setting are found again
        "tree": tree.model_dump(exclude={"prompt_tokens"} if tree.prompt_tokens is None else None),
        "questions": digest_of([[q.benchmark, q.id, q.category, q.messages] for q in questions]),
        "target": target.identity.parts(),
        "device": device_name(target.device),
        "dtype": str(target.dtype),
        "torch": torch.__version__,
        **({"draws": DRAWS_VERSION} if any(config.temperatures) else {}),
        **template_date(target.tokenizer),
        "version": STEP_VERSION,
    }


def _training_metrics(draft: StageFolder) -> list[dict[str, Any]]:
    manifest = draft.manifest()
    if manifest is None or "metrics.jsonl" not in manifest.files:
        return []
    return read_metrics(draft.read_text("metrics.jsonl"))
