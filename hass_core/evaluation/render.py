"""The report's tables and words: what `page` lays out and `terminal` prints.

A table is its column titles and rows of text. Names from outside (targets, benchmarks, questions) may hold markup;
whoever writes them out escapes them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from hass_core.evaluation.lossless import Certificate
from hass_core.evaluation.method_names import PLAIN
from hass_core.evaluation.report import ALL, Report, Score, Served
from hass_core.evaluation.statistics import Estimate

LABELS = {"plain": "plain", "pld": "PLD", "sps": "SpS", "eagle": "EAGLE", "eagle2": "EAGLE-2", "hass": "HASS"}
Rows = list[list[str]]


def headline(report: Report) -> Rows:
    """What the reader wants to know first."""
    main, plain = report.score(report.main_method), report.score(PLAIN)
    return [
        ["method", label(report.main_method)],
        ["speed-up", f"{interval(main.speedup)} ×"],
        ["tokens/s with draft", interval(main.tokens_per_second, 1)],
        ["tokens/s without", interval(plain.tokens_per_second, 1)],
        ["τ, tokens per cycle (macro)", interval(main.tau_macro)],
        ["τ, tokens per cycle (micro)", interval(main.tau_micro)],
        ["lossless", lossless_words(report.lossless, report.same_precision)],
        ["questions, new tokens", f"{main.questions}, {main.new_tokens}"],
    ]


def lossless_words(exact: Certificate | None, same_precision: Certificate | None) -> str:
    """The certificate in a sentence."""
    if exact is None:
        return "not asked: no draft was measured"
    count = f"{exact.tokens} tokens of {exact.questions} answers in {exact.dtype}"
    verdict = f"yes, {count} identical" if exact.identical else f"NO, outputs part in {len(exact.differences)} answers"
    if same_precision is None or same_precision.identical:
        return verdict
    parted = f"{len(same_precision.differences)} of {same_precision.questions} answers part"
    cause = "all at near-ties" if same_precision.only_near_ties else "NOT ALL at near-ties"
    return f"{verdict}; in {same_precision.dtype} {parted}, {cause}"


def paper_table(report: Report) -> tuple[list[str], Rows]:
    """The paper's table: a row per temperature and method, speed-up and τ per benchmark and over all."""
    names = [*report.benchmarks, ALL] if len(report.benchmarks) > 1 else list(report.benchmarks)
    columns = ["T", "method", *(f"{name} {what}" for name in names for what in ("speed-up", "τ"))]
    return columns, _per_method(
        report, lambda m, t: [c for name in names for c in _paper_cells(report.score(m, name, t))]
    )


def half_paper_table(report: Report, figure: Callable[[Score], Estimate]) -> tuple[list[str], Rows]:
    """One figure of the paper's table, in 80 columns: the interval only over all benchmarks."""

    def cells(method: str, temperature: float) -> list[str]:
        each = [figure(report.score(method, name, temperature)).value for name in report.benchmarks]
        return [*(f"{value:.2f}" for value in each), interval(figure(report.score(method, ALL, temperature)))]

    return ["T", "method", *report.benchmarks, ALL], _per_method(report, cells)


def _per_method(report: Report, cells: Callable[[str, float], list[str]]) -> Rows:
    return [[f"{t:g}", label(m), *cells(m, t)] for t in report.temperatures for m in report.methods]


def _paper_cells(score: Score) -> tuple[str, str]:
    return f"{interval(score.speedup)} ×", interval(score.tau_macro)


def speed_table(report: Report) -> tuple[list[str], Rows]:
    """Rates and times over all benchmarks."""
    columns = ["T", "method", "tokens/s", "ms/token p50", "ms/token p95", "τ micro"]
    return columns, [[f"{s.temperature:g}", label(s.method), *_speed_cells(s)] for s in _over_all(report)]


def acceptance_table(report: Report) -> tuple[list[str], Rows]:
    """Share of cycles that accept at least d tokens, for the main method."""
    shares = report.score(report.main_method).acceptance_by_depth
    rows = [[f"{d}", f"{interval(e, 1, 100)} %"] for d, e in enumerate(shares, start=1)]
    return ["depth", "cycles accepting at least so many"], rows


def rank_table(report: Report) -> tuple[list[str], Rows]:
    """How often the draft's first, second, … choice was right where it was offered."""
    shares = report.score(report.main_method).acceptance_by_rank
    rows = [[f"{r}", f"{interval(e, 1, 100)} %"] for r, e in enumerate(shares, start=1)]
    return ["choice", "accepted where offered"], rows


def n_alpha_table(report: Report) -> tuple[list[str], Rows]:
    """n-α, a row per n."""
    rows = [[f"{n}", f"{interval(e, 1, 100)} %"] for n, e in enumerate(report.n_alpha)]
    return ["drafted inputs n", "next draft accepted"], rows


def comparison_table(report: Report) -> tuple[list[str], Rows]:
    """The main method's rate over each other method's, and its τ less theirs."""
    rows = [
        [f"{c.temperature:g}", f"{label(c.method)} and {label(c.other)}", interval(c.speed_ratio), interval(c.tau_gain)]
        for c in report.comparisons
    ]
    return ["T", "methods", "ratio of tokens/s", "difference of τ"], rows


def served_table(report: Report) -> tuple[list[str], Rows]:
    """Our own decoders and the engine on the same questions, all benchmarks together."""
    columns = ["T", "at once", "where", "tokens/s", "speed-up", "τ", "cycles accepting 1, 2, … drafts"]
    ours = [
        [f"{s.temperature:g}", "1", f"here, {label(s.method)}", interval(s.tokens_per_second, 1),
         "" if s.method == PLAIN else f"{interval(s.speedup)} ×", "" if s.method == PLAIN else interval(s.tau_micro),
         _shares(s.acceptance_by_depth)]
        for s in _over_all(report)
    ]  # fmt: skip
    theirs = [
        [f"{s.temperature:g}", f"{s.rows}", _served_name(s), interval(s.tokens_per_second, 1), *_served_cells(s),
         _shares(s.acceptance_by_depth)]
        for s in report.served if s.benchmark == ALL
    ]  # fmt: skip
    return columns, ours + theirs if theirs else []


def served_by_benchmark(report: Report) -> tuple[list[str], Rows]:
    """The engine's speed-up and τ on each benchmark."""
    columns = ["T", "at once", "where", *(f"{name} {what}" for name in report.benchmarks for what in ("speed-up", "τ"))]
    found: dict[tuple[str, str, str], list[str]] = {}
    for s in report.served:
        if s.benchmark != ALL and s.chain != 0:
            found.setdefault((f"{s.temperature:g}", f"{s.rows}", _served_name(s)), []).extend(_served_cells(s))
    return columns, [[*kind, *cells] for kind, cells in found.items()]


def _served_name(served: Served) -> str:
    drafts = "its draft" if served.chain is None else f"chain of {served.chain}" if served.chain else "plain"
    return f"{served.engine}, {drafts}"


def _served_cells(served: Served) -> tuple[str, str]:
    speedup = interval(served.speedup) + " ×" if served.speedup and served.chain != 0 else ""
    return speedup, interval(served.tau) if served.tau else ""


def _shares(shares: list[Estimate]) -> str:
    return ", ".join(f"{100 * share.value:.0f}" for share in shares[:5]) + " %" if shares else ""


def difference_table(report: Report) -> tuple[list[str], Rows]:
    """Every first difference between answers with and without the draft."""
    certificates = [c for c in (report.lossless, report.same_precision) if c]
    rows = [
        [c.dtype, d.question, f"{d.position}", f"{d.logit_gap:.3g}", f"{d.rounding:.3g}", "yes" if d.near_tie else "NO"]
        for c in certificates
        for d in c.differences
    ]
    return ["precision", "question", "token", "logit gap", "rounding error", "near-tie"], rows


def label(method: str) -> str:
    """A method's name as papers write it."""
    return LABELS.get(method, method)


def interval(estimate: Estimate, digits: int = 2, scale: float = 1) -> str:
    """`1.62 [1.55, 1.70]`"""
    value, low, high = (f"{scale * number:.{digits}f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def md(text: str) -> str:
    """Text that shows as it is inside a Markdown table; brackets stay, but make no link."""
    for special in ("\\", "|", "`", "*", "_", "<", ">"):
        text = text.replace(special, "\\" + special)
    return " ".join(text.replace("](", "]\\(").split())


def measured_how(report: Report) -> list[str]:
    """Machine, tree, questions: what the numbers hold for."""
    tree = report.tree
    shape = f"{tree.kind}, depth {tree.depth}, top_k {tree.top_k}, {tree.nodes} nodes"
    chosen = ", chosen by measuring this machine and draft" if report.plan else ""
    runs = f"the fastest of {report.repeats} runs" if report.repeats > 1 else "one run"
    return [
        f"machine: {report.device}, {report.dtype}; batch 1; times include the prefill",
        f"tree: {shape}{chosen}",
        f"answers of at most {report.max_new_tokens} tokens, {runs} of each method",
        f"compilations and captures of CUDA graphs while the clock ran: {report.compilations}",
        *([f"the engine: {report.served_how}; every turn a request of its own over HTTP"] if report.served else []),
        f"questions: {', '.join(f'{count} of {name}' for name, count in report.benchmarks.items())}",
        f"transformers' own `generate` on one question: {report.generate_tokens_per_second:.1f} tokens/s",
        training_prompts(report),
        *_made_with(report.provenance),
    ]


def training_prompts(report: Report) -> str:
    """Whether the questions were held against what the draft was trained on."""
    known = "compared by hash: none was trained on" if report.leak_checked else "not known here, so not compared"
    return f"training prompts: {known}"


def _made_with(provenance: Mapping[str, Any]) -> list[str]:
    if not (versions := provenance.get("packages")):
        return []
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commit = f", commit {provenance['commit']}" if provenance.get("commit") else ""
    return [f"versions: hass {provenance.get('hass')}{commit}, Python {provenance.get('python')}, {told}"]


def _over_all(report: Report) -> list[Score]:
    return [report.score(m, ALL, t) for t in report.temperatures for m in report.methods]


def _speed_cells(score: Score) -> list[str]:
    p50, p95 = score.time_per_output_token_p50, score.time_per_output_token_p95
    return [interval(score.tokens_per_second, 1), interval(p50, 1), interval(p95, 1), interval(score.tau_micro)]
