"""The questions of an evaluation put to a serving engine: what a draft gives there, and with many requests at once.

    in turn, one at a time     a unit is a question, its turns one after the other, as our own decoders answer them
    R at once                  a unit is R requests of one benchmark, begun together; two units of each at least

A later turn's history holds our own plain decoding's answers, so every engine reads the same prompts. The clock runs
here; drafts and accepted tokens are what the engine's counters grew by, and those must have grown by these answers and
nothing else. Units are what the intervals draw again.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch

from hass_core.config import EvaluationConfig, SamplingConfig
from hass_core.data.conversations import with_answers_due
from hass_core.data.templates import Message, decode
from hass_core.errors import BadInput
from hass_core.evaluation.benchmarks import Question
from hass_core.evaluation.engine_metrics import VLLM_ENGINE, Acceptance, Reading
from hass_core.evaluation.measure import encode, opening
from hass_core.evaluation.method_names import PLAIN
from hass_core.evaluation.metrics import Measurement
from hass_core.evaluation.report import ALL, Served
from hass_core.evaluation.server import Answer, Server
from hass_core.evaluation.statistics import Estimate, Statistic, bootstrap, mean, ratio_of_rates, ratio_of_sums
from hass_core.progress import Progress
from hass_core.target_model.loader import Target

LEAST_UNITS = 2  # of a benchmark: a single one would have no interval
SAME_TARGET = 0.9  # of a greedy answer's tokens must be the target's likeliest; rounding moves a few
KNOWN_BY_TOKENS = 48


@dataclass(frozen=True)
class Unit:
    """Requests that are measured together: all at once, or one after the other."""

    benchmark: str
    turns: tuple[tuple[Message, ...], ...]
    rows: int


@dataclass(frozen=True)
class Measured:
    """A unit answered by one side."""

    side: str
    temperature: float
    unit: Unit
    new_tokens: int
    seconds: float
    acceptance: Acceptance | None


def check_served(server: Server, target: Target, question: Question, drafts: bool) -> None:
    """Raise BadInput where a server has another model or chat template than the target, or drafts when it should not,
    or does not when it should. A greedy answer to one question is looked at token by token."""
    before = server.reading()
    told_ids = before.engine == VLLM_ENGINE
    answer = server.answer(opening(question), SamplingConfig(), KNOWN_BY_TOKENS, with_token_ids=told_ids)
    _check_drafts(server, _grown(server, before, [answer]), drafts)
    prompt = encode(target, question, opening(question))
    if answer.prompt_tokens != len(prompt):
        raise BadInput(
            f"{server.url} read question {question.id} as {answer.prompt_tokens} tokens, {target.name} reads it as "
            f"{len(prompt)}: it serves another model or chat template; it calls its model {server.model}"
        )
    ids = list(answer.token_ids) or target.tokenizer.encode(answer.text, add_special_tokens=False)
    if ids and (share := _likeliest(target, prompt, ids)) < SAME_TARGET:
        raise BadInput(
            f"{server.url} serves another model than {target.name}: of its greedy answer to question {question.id} "
            f"{share:.0%} of the tokens are that model's likeliest; it calls its model {server.model}"
        )


def measure_sides(
    sides: Mapping[str, Server],
    questions: Sequence[Question],
    own: Sequence[Measurement],
    rows: Sequence[int],
    target: Target,
    config: EvaluationConfig,
    progress: Progress,
) -> list[Measured]:
    """Every unit by every side, one right after the other; each side's first unit of a kind is answered once before.

    `own` holds our own plain decoding's answers to the same questions. Raises BadInput as `Server.reading_after` does.
    """
    found: list[Measured] = []
    kinds = [(temperature, number) for temperature in config.temperatures for number in rows]
    for done, (temperature, number) in enumerate(kinds):
        progress(done, len(kinds), f"in the engine, T = {temperature:g}, {number} at once")
        units = _units(_turns(questions, own, temperature, target), number)
        sampling = SamplingConfig(temperature=temperature)
        for server in sides.values():
            _answered(server, units[0], sampling, config.max_new_tokens)
        for unit in units:
            found += [_measured(side, sides[side], unit, sampling, config.max_new_tokens) for side in sides]
    return found


def scores(
    measured: Sequence[Measured], engine: str, benchmarks: Sequence[str], config: EvaluationConfig
) -> list[Served]:
    """By temperature, rows and side, on all benchmarks together and then on each."""
    names = [ALL, *benchmarks] if len(benchmarks) > 1 else [ALL]
    kinds = dict.fromkeys((m.temperature, m.unit.rows, m.side) for m in measured)
    found = []
    for temperature, rows, side in sorted(kinds, key=lambda kind: kind[:2]):
        alike = [m for m in measured if (m.temperature, m.unit.rows) == (temperature, rows)]
        for name in names:
            ours, plain = (
                [m for m in alike if m.side == wanted and name in (ALL, m.unit.benchmark)] for wanted in (side, PLAIN)
            )
            found.append(_score(ours, plain, engine, name, config))
    return found


def _score(
    ours: Sequence[Measured], plain: Sequence[Measured], engine: str, benchmark: str, config: EvaluationConfig
) -> Served:
    def estimate(statistic: Statistic, *columns: np.ndarray) -> Estimate:
        return bootstrap(statistic, *columns, resamples=config.bootstrap_resamples, seed=config.seed)

    first, counts = ours[0], [m.acceptance for m in ours if m.acceptance]
    cycles, accepted = (np.array([getattr(count, name) for count in counts]) for name in ("drafts", "accepted"))
    positions = max((len(count.by_position) for count in counts), default=0)
    by_depth = np.array([(*count.by_position, *[0.0] * positions)[:positions] for count in counts])
    gauges = np.array([count.gauge for count in counts if count.gauge is not None])
    tau = (
        estimate(mean, gauges)
        if len(gauges)
        else estimate(ratio_of_sums, accepted + cycles, cycles)
        if counts
        else None
    )
    return Served(
        engine=engine,
        chain=0 if not counts else positions if engine == VLLM_ENGINE else None,
        temperature=first.temperature,
        rows=first.unit.rows,
        benchmark=benchmark,
        requests=sum(len(m.unit.turns) for m in ours),
        new_tokens=sum(m.new_tokens for m in ours),
        tokens_per_second=estimate(ratio_of_sums, *_rate(ours)),
        speedup=estimate(ratio_of_rates, *_rate(ours), *_rate(plain)) if plain else None,
        tau=tau,
        acceptance_by_depth=[estimate(ratio_of_sums, by_depth[:, depth], cycles) for depth in range(positions)],
    )


def _rate(measured: Sequence[Measured]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([m.new_tokens for m in measured]), np.array([m.seconds for m in measured])


def _measured(side: str, server: Server, unit: Unit, sampling: SamplingConfig, max_tokens: int) -> Measured:
    before = server.reading()
    started = time.perf_counter()
    answers = _answered(server, unit, sampling, max_tokens)
    seconds = time.perf_counter() - started
    if unit.rows == 1:  # its turns are told apart from the time between them
        seconds = sum(answer.seconds for answer in answers)
    grown = _grown(server, before, answers)
    new_tokens = sum(answer.new_tokens for answer in answers)
    return Measured(side, sampling.temperature, unit, new_tokens, seconds, None if side == PLAIN else grown)


def _answered(server: Server, unit: Unit, sampling: SamplingConfig, max_tokens: int) -> list[Answer]:
    """All turns of a unit, `rows` at a time. No seeds: engines draw rows with seeds of their own one by one."""
    with ThreadPoolExecutor(unit.rows) as threads:
        return list(threads.map(lambda turn: server.answer(turn, sampling, max_tokens), unit.turns))


def _grown(server: Server, before: Reading, answers: Sequence[Answer]) -> Acceptance:
    """What the server's draft did for these answers; nothing where it has none."""
    after = server.reading_after(before, answers)
    return after.acceptance.since(before.acceptance) if after.acceptance else Acceptance()


def _check_drafts(server: Server, grown: Acceptance, wanted: bool) -> None:
    if wanted and grown.tau is None:
        raise BadInput(
            f"{server.url} drafted nothing while it answered: it runs without speculative decoding; start it with the "
            "draft (hass export prints how), or name it as --plain-server"
        )
    if not wanted and grown.tau is not None:
        raise BadInput(f"{server.url} drafts, so it cannot be the plain one: start a server without a draft")


def _turns(
    questions: Sequence[Question], own: Sequence[Measurement], temperature: float, target: Target
) -> list[tuple[Question, tuple[Message, ...]]]:
    """Every turn that our own plain decoding answered, with its history."""
    answers = {(m.benchmark, m.question): m for m in own if m.method == PLAIN and m.temperature == temperature}
    found = []
    for question in questions:
        given = iter(answers[question.benchmark, question.id].token_ids)
        history: list[Message] = []
        for message, due in with_answers_due(question.messages):
            history.append(message)
            if not due:
                continue
            if (ids := next(given, None)) is None:  # the conversation had outgrown the context
                break
            found.append((question, tuple(history)))
            ended = bool(ids) and ids[-1] in target.eos_token_ids
            history.append({"role": "assistant", "content": decode(target.tokenizer, ids[:-1] if ended else ids)})
    return found


def _units(turns: Sequence[tuple[Question, tuple[Message, ...]]], rows: int) -> list[Unit]:
    """A unit a question, or groups of `rows` turns of a benchmark; a short benchmark's turns come again and again."""
    groups: dict[tuple[str, ...], list[tuple[Message, ...]]] = {}
    for question, turn in turns:
        key = (question.benchmark, question.id) if rows == 1 else (question.benchmark,)
        groups.setdefault(key, []).append(turn)
    if rows == 1:
        return [Unit(key[0], tuple(own), 1) for key, own in groups.items()]
    return [
        Unit(key[0], tuple(islice(cycle(own), number * rows, (number + 1) * rows)), rows)
        for key, own in groups.items()
        for number in range(max(LEAST_UNITS, -(-len(own) // rows)))
    ]


def _likeliest(target: Target, prompt: list[int], answer: list[int]) -> float:
    """Share of an answer's tokens that are the target's own choice behind those before."""
    with torch.inference_mode():
        rows = torch.tensor([prompt + answer], device=target.device)
        logits = target.model(input_ids=rows, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return float((logits.argmax(-1).cpu() == torch.tensor(answer)).float().mean())
