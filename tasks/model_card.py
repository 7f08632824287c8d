"""The card of a registered draft: where it comes from, how it was trained, what it gives, for which target."""

from collections.abc import Mapping
from typing import Any

from hass_core.config import RunConfig
from hass_core.evaluation.method_names import PLAIN
from hass_core.evaluation.render import interval
from hass_core.evaluation.report import Report
from hass_core.evaluation.statistics import Estimate
from hass_core.export.card import cell
from hass_core.store import Artifact
from hass_core.store.provenance import code_commit
from hass_core.target_model.licence import target_licence
from hass_core.target_model.loader import Target


def model_card(config: RunConfig, target: Target, stages: Mapping[str, Artifact], report: Report | None = None) -> str:
    """Markdown from the settings, the stages' own numbers and the evaluation's; what is missing is left out."""
    found = {name: stage.summary for name, stage in stages.items()}
    rows = {
        "target": f"{target.name}, fingerprint {target.fingerprint}; it serves no other",
        "data": _data(found.get("prompts", {}), found.get("responses", {})),
        "recipe": _recipe(config, found.get("draft", {})),
        "licence of the target": f"{target_licence(config.target)}; it applies to the draft",
        "code": f"{code_commit() or 'unknown'}, Apache-2.0",
    }
    lines = [f"# Speculative draft for {cell(target.name)}", ""]
    if result := _result(found.get("evaluation", {})):
        lines += [f"**{result}**", ""]
    lines += ["A HASS draft (arXiv 2408.15766). The target verifies every guess: its output does not change.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in rows.items() if value)]
    if report and report.main_method != PLAIN:
        lines += ["", *_by_temperature(report)]
    return "\n".join(lines) + "\n"


def _by_temperature(report: Report) -> list[str]:
    """What was measured at each temperature, and what follows from it."""
    method = report.main_method
    scores = [report.score(method, temperature=temperature) for temperature in report.temperatures]
    rows = [
        f"| {s.temperature:g} | {interval(s.speedup)} × | {interval(s.tau_micro)} | {_advice(s.speedup)} |"
        for s in scores
    ]
    return [
        f"Measured on {cell(report.device)}, one request at a time, by the decoder of `hass serve`, "
        f"{sum(report.benchmarks.values())} questions:",
        "",
        "| temperature | speed-up over plain decoding | τ | so |",
        "|---|---|---|---|",
        *rows,
        "",
        "Other temperatures were not measured; the higher one is, the less a draft gains. vLLM and SGLang draft in "
        "another way when they sample: an export's own card says how, and `hass evaluate --engine vllm` measures it.",
    ]


def _advice(speedup: Estimate) -> str:
    if speedup.low > 1:
        return "use it"
    return "decode without it" if speedup.high < 1 else "no gain was measured"


def _data(prompts: Mapping[str, Any], responses: Mapping[str, Any]) -> str:
    if not responses:
        return ""
    return (
        f"{prompts.get('prompts', '?')} prompts, answered by the target itself: "
        f"{responses['conversations']} conversations, {responses['response_tokens']:,} tokens"
    )


def _recipe(config: RunConfig, draft: Mapping[str, Any]) -> str:
    training = config.training
    told = f"{training.align_steps} alignment steps, Top-K {training.top_k} with weight {training.top_k_weight:g}, "
    told += f"{training.optimizer} at {training.lr_peak:g}"
    if config.pretraining:
        told += f", after {config.pretraining.passes:g} passes with Top-K weight {config.pretraining.top_k_weight:g}"
    if "tokens_seen" in draft:
        told += f", {draft['tokens_seen']:,} tokens seen, best of step {draft['best_step']}"
    return told


def _result(evaluation: Mapping[str, Any]) -> str:
    if "tau_macro" not in evaluation:
        return ""
    low, high = evaluation["speedup_low"], evaluation["speedup_high"]
    exact = "lossless" if evaluation["lossless"] else "NOT lossless"
    return f"{evaluation['speedup']:.2f} [{low:.2f}, {high:.2f}] × plain, τ {evaluation['tau_macro']:.2f}, {exact}"
