"""What a verdict stands on: duels of the challenger, in this process or in the servers that will serve.

the champion is of this target      challenger against champion
it is of another, or there is none  against plain decoding, and against the old draft where that loads
the store no longer holds it        against plain decoding
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from hass_core.config import RunConfig
from hass_core.evaluation import duel
from hass_core.evaluation.benchmarks import load_benchmarks
from hass_core.evaluation.evaluate import evaluate_draft, read_report
from hass_core.evaluation.served import check_served
from hass_core.evaluation.server import Server
from hass_core.evaluation.server_duel import contest
from hass_core.evaluation.server_process import serving
from hass_core.progress import Progress
from hass_core.store import Artifact
from tasks.export import DraftSource, tree_of, write_export
from tasks.gate import NOT_LOSSLESS, PLAIN_DECODING, Verdict, all_of, judge
from tasks.resources import is_held, is_served, made_of, store_of, target_of
from tasks.stage_lines import told
from tasks.summary import stage_words
from tasks.tracking import DraftVersion

PLAIN_ROUNDS = 1  # against plain decoding gains are far larger than what a round adds


def measured_verdict(
    config: RunConfig, challenger: DraftVersion, champion: DraftVersion | None, progress: Progress
) -> Verdict:
    """The gate's word after the duels."""
    evaluation = _evaluated(config, challenger, progress)
    lossless = bool(evaluation.summary["lossless"])
    held = champion is not None and is_held(config, champion)
    if champion and held and is_served(config, champion):
        if config.promotion.judge == "server":
            return _judged_by_servers(config, challenger, champion, lossless, progress)
        return _against(config, challenger, evaluation, champion, progress)
    reason = "there is no champion"
    if champion and held:
        name = target_of(config).name
        reason = f"version {champion.version} is no draft of {name} as it is now: it counts as none"
    elif champion:
        reason = f"the store {config.store} does not hold the draft of version {champion.version}: it counts as none"
    found = [Verdict(promoted=lossless, reasons=(reason,) if lossless else (reason, NOT_LOSSLESS))]
    if config.promotion.beat_plain:
        found.append(_against(config, challenger, evaluation, None, progress))
    if champion and held and duel.loads(store_of(config).open(champion.draft), target_of(config)):
        found.append(_against(config, challenger, evaluation, champion, progress))
    return all_of(found)


def _against(
    config: RunConfig, challenger: DraftVersion, evaluation: Artifact, champion: DraftVersion | None, progress: Progress
) -> Verdict:
    """A duel in this process, with the tree of the challenger's evaluation; None: with plain decoding."""
    store, rules = store_of(config), config.promotion
    name = f"the champion (version {champion.version})" if champion else PLAIN_DECODING
    opponent, rounds = (champion.draft, rules.rounds) if champion else (None, PLAIN_ROUNDS)
    tree = read_report(store, evaluation).tree

    def fought() -> Verdict:
        found = duel.run_duel(config, challenger.draft, opponent, tree, rounds, store, target_of(config), progress)
        return judge(duel.read_bouts(store, found), bool(evaluation.summary["lossless"]), rules, name)

    return told("duel", fought, lambda verdict: f"against {name}, {verdict.gain_words()}")


def _judged_by_servers(
    config: RunConfig, challenger: DraftVersion, champion: DraftVersion, lossless: bool, progress: Progress
) -> Verdict:
    """The gate's word after two servers have answered."""
    rules, samplings = config.promotion, duel.duel_samplings(target_of(config))
    with _servers(config, challenger, champion) as (new, old):
        questions = load_benchmarks(config.evaluation)
        for server in (new, old):  # which draft it holds cannot be seen from here, which target can
            check_served(server, target_of(config), questions[0], drafts=True)
        asked = (new, old, questions, samplings, rules.rounds, config.evaluation, progress)
        found = told("duel", partial(contest, *asked), lambda found: f"{len(found.bouts)} answers of either server")
    verdict = judge(found.bouts, lossless, rules, f"the champion (version {champion.version})")
    counted = f"{found.challenger.tau:.2f} and {found.champion.tau:.2f}"
    how = f"{verdict.measured} Measured in the servers {new.url} and {old.url}, which counted τ {counted}."
    return verdict.model_copy(update={"measured": how})


@contextmanager
def _servers(config: RunConfig, challenger: DraftVersion, champion: DraftVersion) -> Iterator[tuple[Server, Server]]:
    """Those of the settings, where which draft each serves is its operator's word, or two started for the purpose."""
    rules = config.promotion
    if rules.server_command is None:
        assert rules.challenger_url
        assert rules.champion_url
        yield Server(rules.challenger_url), Server(rules.champion_url)
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="hass-judge-")))
        started = []
        for version in (challenger, champion):
            draft = folder / version.version
            tree = tree_of(config, version)
            write_export(config, DraftSource(version=version), rules.server_engine, draft, tree, None)
            server = serving(rules.server_command, target_of(config).folder, draft, tree.depth)
            started.append(Server(stack.enter_context(server)))
        yield started[0], started[1]


def _evaluated(config: RunConfig, version: DraftVersion, progress: Progress) -> Artifact:
    """The evaluation that the version was registered with; one made here where the store does not hold it."""
    if found := made_of(config, version, "evaluation"):
        return found
    work = partial(evaluate_draft, config, version.draft, store_of(config), target_of(config), progress)
    return told("evaluation", work, stage_words)
