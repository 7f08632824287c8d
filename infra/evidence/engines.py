"""Tokens per second and tokens per cycle of running vLLM servers, side by side, with intervals.

    python -m infra.evidence.engines plain=http://127.0.0.1:8100 chain3=http://127.0.0.1:8101 … --out RECORD.json \
        --benchmarks mt_bench.jsonl humaneval.jsonl gsm8k.jsonl

The servers share a GPU and each has its whole attention in turn; which one begins changes from round to round, so that
neither the GPU's clock nor the order favours one. One request at a time: every round asks its share of the questions,
and a question is the unit of the intervals. More at once: every round asks all of them for as many requests as keep the
rows full, and a round is the unit. What was asked first is not counted. Every figure of a server stands beside that of
the first server on the same questions or in the same round.
"""

import argparse
import json
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hass_core.config import EvaluationConfig, SamplingConfig
from hass_core.data.templates import Message
from hass_core.errors import ConfigError
from hass_core.evaluation.benchmarks import load_benchmarks
from hass_core.evaluation.measure import opening
from hass_core.evaluation.server import Answer, Server
from hass_core.evaluation.statistics import bootstrap, ratio_of_rates, ratio_of_sums
from hass_core.store.provenance import provenance
from infra.mistakes import in_one_sentence

KINDS = ((1, 0.0), (1, 1.0), (4, 0.0), (16, 0.0), (64, 0.0), (64, 1.0))  # requests at once and temperature
LEAST_REQUESTS = 48  # of a round with several at once


@dataclass(frozen=True)
class Unit:
    """What was asked together: tokens that came back, seconds it took, cycles and accepted drafts (0 without a
    draft)."""

    tokens: float
    seconds: float
    cycles: float
    accepted: float


def asked(server: Server, openings: list[list[Message]], rows: int, temperature: float, tokens: int) -> Unit:
    """These questions, `rows` of them at a time."""
    sampling = SamplingConfig(temperature=temperature)
    before = server.reading()
    with ThreadPoolExecutor(rows) as threads:
        started = time.perf_counter()
        answers: list[Answer] = list(threads.map(lambda messages: server.answer(messages, sampling, tokens), openings))
        seconds = time.perf_counter() - started
    after = server.reading_after(before, answers)
    drafted = after.acceptance.since(before.acceptance) if after.acceptance else None
    made = sum(answer.new_tokens for answer in answers)
    return Unit(made, seconds, drafted.drafts if drafted else 0, drafted.accepted if drafted else 0)


def units_of(
    server: Server, openings: list[list[Message]], rows: int, temperature: float, tokens: int, turn: int, turns: int
) -> list[Unit]:
    """What one server does in one round."""
    if rows == 1:
        return [asked(server, [messages], 1, temperature, tokens) for messages in openings[turn::turns]]
    first = turn * len(openings) // turns
    repeated = (openings[first:] + openings[:first]) * (1 + max(2 * rows, LEAST_REQUESTS) // len(openings))
    return [asked(server, repeated[: max(2 * rows, LEAST_REQUESTS)], rows, temperature, tokens)]


def summary(units: list[Unit], first: list[Unit]) -> dict[str, object]:
    """Of a server's units at one kind of load, beside those of the first server."""
    columns = np.array([[u.tokens, u.seconds, u.cycles, u.accepted] for u in units]).T
    plain = np.array([[u.tokens, u.seconds] for u in first]).T
    found: dict[str, object] = {
        "units": len(units), "tokens": int(columns[0].sum()),
        "tokens_per_second": bootstrap(ratio_of_sums, columns[0], columns[1]).model_dump(),
    }  # fmt: skip
    if columns[2].any():
        found["tau"] = bootstrap(ratio_of_sums, columns[2] + columns[3], columns[2]).model_dump()
    if units is not first:
        found["over_first"] = bootstrap(ratio_of_rates, columns[0], columns[1], *plain).model_dump()
    return found


def named(given: str) -> tuple[str, Server]:
    """A server of the command line. Raises ConfigError where it has no name, Unreachable where it does not answer."""
    name, _, url = given.partition("=")
    if not url:
        raise ConfigError(f"{given!r} is no NAME=URL, such as plain=http://127.0.0.1:8100")
    return name, Server(url)


def main() -> None:
    """Parse the command line, measure; a line a round, and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--benchmarks", type=Path, nargs="+", required=True)
    parser.add_argument("--each", type=int, default=8, help="questions of each benchmark")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    servers = dict(named(given) for given in options.servers)
    files = tuple(str(file) for file in options.benchmarks)
    questions = load_benchmarks(EvaluationConfig(benchmarks=files, max_questions=options.each))
    openings = [opening(question) for question in questions]
    for rows, temperature in KINDS:
        for server in servers.values():
            asked(server, (openings * rows)[: max(2, rows)], rows, temperature, options.tokens)
    found: dict[tuple[int, float], dict[str, list[Unit]]] = {kind: defaultdict(list) for kind in KINDS}
    for turn in range(options.rounds):
        names = list(servers)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        for (rows, temperature), of_server in found.items():
            for name in names:
                of_server[name] += units_of(
                    servers[name], openings, rows, temperature, options.tokens, turn, options.rounds
                )
        results = {
            f"{rows} at a time, T = {temperature:g}": {
                name: summary(of_server[name], of_server[next(iter(servers))]) for name in servers
            }
            for (rows, temperature), of_server in found.items()
        }
        setting = {"questions": len(openings), "answer_tokens": options.tokens, "rounds": turn + 1}
        options.out.write_text(json.dumps({"results": results, **setting, **provenance()}, indent=1) + "\n")
        print(f"round {turn + 1} of {options.rounds}", flush=True)


if __name__ == "__main__":
    in_one_sentence(main)
