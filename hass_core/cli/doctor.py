"""`hass doctor`: name what is wrong and how to mend it. Exit status 1 when something is."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hass_core.cli.common import console, progress_bar, show_json
from hass_core.cli.draft_address import target_of
from hass_core.cli.options import AsJson, Draft, TargetSource
from hass_core.config import Engine, EvaluationConfig, SamplingConfig
from hass_core.errors import FINDINGS, BadInput
from hass_core.evaluation.benchmark_names import check_benchmarks
from hass_core.settings import validated
from hass_core.target_model.source import DEFAULT

app = typer.Typer()


@app.command()
def draft(
    folder: Draft,
    engine: Annotated[Engine, typer.Option(help="The engine that will serve it")],
    target: TargetSource = None,
    source: Annotated[
        Path | None, typer.Option(help="The draft that FOLDER was exported from: every tensor is compared")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a draft's tensors and config.json for one engine, against its target and what it was exported from.

    Example: hass doctor draft exported --engine vllm
    """
    from hass_core.draft_model.accounting import read_draft
    from hass_core.draft_model.engines import ENGINES
    from hass_core.export.checks import check_draft
    from hass_core.target_model.loader import load_target

    loaded = load_target(target_of(folder, target).model_copy(update={"device": "cpu"}))
    findings = check_draft(folder, loaded, ENGINES[engine], read_draft(source, loaded) if source else None)
    if as_json:
        show_json(findings)
        raise typer.Exit(FINDINGS if findings else 0)
    for finding in findings:
        console.print(f"[bold red]{escape(finding.check)}[/]  {escape(finding.what)}.")
        console.print(f"    {escape(finding.consequence)}.\n    To mend: {escape(finding.mend)}.", highlight=False)
    if findings:
        raise typer.Exit(FINDINGS)
    console.print(f"{folder} is ready for {ENGINES[engine].title}", highlight=False)


@app.command()
def acceptance(
    folder: Draft,
    target: TargetSource = None,
    questions: Annotated[str, typer.Option(help="heldout, or a file of questions")] = "heldout",
    limit: Annotated[int, typer.Option(min=1, help="Ask this many, spread over the categories")] = 40,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens an answer may have")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature as served")] = 0.0,
    trained_tokens: Annotated[int | None, typer.Option(min=1, help="Longest conversation of training")] = None,
    trained_template: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File with the chat template of training")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain a low τ: what each cause costs, the dearest first, and how to mend it.

    Example: hass doctor acceptance .hass/store/draft/DIGEST
    """
    asked_of = validated(EvaluationConfig, {"benchmarks": (questions,), "max_questions": limit}, "the questions")
    validated(SamplingConfig, {"temperature": temperature}, "sampling")
    check_benchmarks(asked_of.benchmarks)
    template = _text(trained_template) if trained_template else None
    from hass_core.cli.acceptance_report import show_diagnosis
    from hass_core.diagnosis.acceptance import diagnose
    from hass_core.diagnosis.variants import Settings
    from hass_core.evaluation.benchmarks import load_benchmarks
    from hass_core.target_model.loader import load_target

    asked = load_benchmarks(asked_of)
    loaded = load_target(target_of(folder, target))
    settings = Settings(temperature, max_new_tokens, trained_tokens, template)
    with progress_bar("acceptance") as progress:
        diagnosis = diagnose(folder, loaded, asked, settings, progress)
    if as_json:
        return show_json(diagnosis)
    show_diagnosis(console, diagnosis)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{file} is no text of UTF-8; give the file with the chat template") from None


@app.command()
def data(
    features: Annotated[str, typer.Argument(help="Folder of a features stage: STORE/features/DIGEST, local or s3://")],
    target: TargetSource = None,
    masks_only: Annotated[bool, typer.Option(help="Show the mask audit without reading every feature")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is supervised in stored features, and check every row.

    Example: hass doctor data .hass/store/features/DIGEST
    """
    from hass_core.store import store_at

    store, artifact = store_at(features, "features")
    from hass_core.cli.data_report import show_audit, show_problems
    from hass_core.features.checks import find_audit, validate_features

    audit = find_audit(store, artifact, target or DEFAULT)
    if not as_json:
        show_audit(console, audit)
    problems = list(audit.problems)
    if not masks_only:
        problems += validate_features(store, artifact).problems
    if as_json:
        show_json({"audit": audit, "problems": problems})
    else:
        show_problems(console, problems)
    if problems:
        raise typer.Exit(FINDINGS)
