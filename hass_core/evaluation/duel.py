"""Two drafts, or a draft and plain decoding, face to face: the measuring behind a promotion.

Both sides answer the same question one right after the other, with the same tree, at T = 0 and with the sampling that
the target itself recommends, and all of that again in every round. A round builds its decoders anew, in the other
order: where memory happens to lie makes one of two equal drafts faster for as long as it lives.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from hass_core.config import RunConfig, SamplingConfig, TreeConfig
from hass_core.decoding.decoder import Decoder, PlainDecoder, SpeculativeDecoder
from hass_core.draft_model.checkpoint import load_draft
from hass_core.errors import DraftMismatch
from hass_core.evaluation.benchmarks import Question, load_benchmarks
from hass_core.evaluation.evaluate import local_draft, measured_by
from hass_core.evaluation.measure import Examiner, check_lengths
from hass_core.evaluation.metrics import Measurement
from hass_core.memory import release_unused
from hass_core.progress import Progress, no_progress
from hass_core.store import Artifact, StageFolder, Store
from hass_core.store.journal import Journal
from hass_core.target_model.loader import Target
from hass_core.target_model.runner import make_runner

STAGE = "duel"
STEP_VERSION = 1
CHALLENGER, OPPONENT = "challenger", "opponent"
FILE = "bouts.parquet"


class Bout(BaseModel, frozen=True):
    """One question answered by both sides in one round."""

    round: int
    challenger: Measurement
    opponent: Measurement


def run_duel(
    config: RunConfig,
    challenger: Artifact,
    opponent: Artifact | None,
    tree: TreeConfig,
    rounds: int,
    store: Store,
    target: Target,
    progress: Progress = no_progress,
) -> Artifact:
    """Measure the draft `challenger` against `opponent` (None: plain decoding), both with `tree`.

    A duel is one measurement: both sides of it come from the same process, so a finished one is found again whole.
    Raises BadInput, ContextTooLong or DraftMismatch before anything slow.
    """
    questions = load_benchmarks(config.evaluation)
    samplings = duel_samplings(target)
    key = {
        "challenger": challenger.digest,
        "opponent": opponent and opponent.digest,
        "rounds": rounds,
        "samplings": [sampling.model_dump() for sampling in samplings],
        "measured": measured_by(config.evaluation, tree, target, questions),
        "version": STEP_VERSION,
    }
    folder = store.stage(STAGE, key)
    if done := folder.artifact():
        return done
    check_lengths(target, questions, config.evaluation)
    sides = {CHALLENGER: local_draft(store.open(challenger)), OPPONENT: opponent and local_draft(store.open(opponent))}
    arena = Arena(config, target, sides, tree, Journal(folder.scratch() / "bouts.jsonl", synced=True))
    bouts = list(arena.fight(questions, samplings, rounds, progress))
    with folder.writing(FILE) as file:
        pq.write_table(pa.Table.from_pylist([bout.model_dump() for bout in bouts]), file.path)
    compiled = sum(m.compilations for bout in bouts for m in (bout.challenger, bout.opponent))
    return folder.finish({"bouts": len(bouts), "rounds": rounds, "questions": len(questions), "compilations": compiled})


def read_bouts(store: Store, duel: Artifact) -> list[Bout]:
    """The bouts of a finished duel."""
    return [Bout.model_validate(row) for row in pq.read_table(store.open(duel).local_path(FILE)).to_pylist()]


def loads(draft: StageFolder, target: Target) -> bool:
    """Whether a draft, perhaps of another target, can draft for this one: all sizes agree."""
    try:
        load_draft(local_draft(draft), target, check=False)
    except DraftMismatch:
        return False
    return True


def duel_samplings(target: Target) -> tuple[SamplingConfig, ...]:
    """Greedy, and the target's own default sampling where that is another."""
    own = default_sampling(target)
    return (SamplingConfig(),) if own.temperature == 0 else (SamplingConfig(), own)


def default_sampling(target: Target) -> SamplingConfig:
    """What the target's generation_config.json states; temperature 1 where it says nothing, as vLLM and SGLang do."""
    told: dict[str, Any] = target.model.generation_config.to_diff_dict()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: told[name] for name in names if told.get(name) is not None}
    return SamplingConfig.model_validate({"temperature": 1.0} | given)


class Arena:
    """The target, two sides, and what was measured of them so far."""

    def __init__(
        self, config: RunConfig, target: Target, sides: dict[str, Path | None], tree: TreeConfig, journal: Journal
    ):
        self._config = config.evaluation.model_copy(update={"repeats": 1})
        self._target, self._sides, self._tree, self._journal = target, sides, tree, journal
        self._runner = make_runner(target)

    def fight(
        self, questions: Sequence[Question], samplings: Sequence[SamplingConfig], rounds: int, progress: Progress
    ) -> Iterator[Bout]:
        """Every question, with every sampling, in every round."""
        total = rounds * len(samplings) * len(questions)
        done = 0
        for lap in range(rounds):
            for sampling in samplings:
                for bout in self._heat(questions, sampling, lap):
                    progress(done := done + 1, total, f"round {lap + 1} of {rounds}")
                    yield bout

    def _heat(self, questions: Sequence[Question], sampling: SamplingConfig, lap: int) -> Iterator[Bout]:
        examiner: Examiner | None = None
        for question in questions:
            unit = f"{lap}/{sampling.temperature:g}/{question.benchmark}/{question.id}"
            if unit not in self._journal:
                if examiner is None:
                    examiner = Examiner(self._target, self._decoders(lap), self._config)
                    examiner.warm_up(questions, sampling)
                by_side = {m.method: m for m in examiner.measure(question, sampling, lap)}
                bout = Bout(round=lap, challenger=by_side[CHALLENGER], opponent=by_side[OPPONENT])
                self._journal[unit] = bout.model_dump()
            yield Bout.model_validate(self._journal[unit])
        release_unused()

    def _decoders(self, lap: int) -> dict[str, Decoder]:
        """Both sides' decoders; the first one speaks in conversations of several turns."""
        names = (CHALLENGER, OPPONENT) if lap % 2 else (OPPONENT, CHALLENGER)
        return {name: self._decoder(name) for name in names}

    def _decoder(self, name: str) -> Decoder:
        folder = self._sides[name]
        if folder is None:
            return PlainDecoder(self._runner)
        draft = load_draft(folder, self._target, check=name == CHALLENGER)  # an old target's draft may be an opponent
        return SpeculativeDecoder(self._runner, draft, self._tree, name=name)
