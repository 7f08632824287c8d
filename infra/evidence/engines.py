"""Tokens per second and tokens per cycle of running vLLM servers, side by side, in a minute; one JSON line a figure.

    python -m infra.evidence.engines plain=http://127.0.0.1:8100 chain3=http://127.0.0.1:8101 … \
        --benchmarks mt_bench.jsonl humaneval.jsonl gsm8k.jsonl

Each server has the GPU's whole attention in turn, the others wait. One request at a time: every second question; more
at once: all of them again and again. A first part is asked without being counted. `hass evaluate --server` measures the
same with intervals and our own decoder beside, and takes minutes for each server.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hass_core.config import EvaluationConfig, SamplingConfig
from hass_core.data.templates import Message
from hass_core.errors import ConfigError
from hass_core.evaluation.benchmarks import load_benchmarks
from hass_core.evaluation.measure import opening
from hass_core.evaluation.server import Answer, Server
from infra.mistakes import in_one_sentence

KINDS = ((1, 0.0), (1, 1.0), (64, 0.0), (16, 0.0), (4, 0.0))  # requests at once and temperature
NEW_TOKENS = 96
LEAST_REQUESTS = 48


def measured(server: Server, openings: list[list[Message]], rows: int, temperature: float) -> dict[str, object]:
    """One figure of one server."""
    sampling = SamplingConfig(temperature=temperature)
    chosen = openings[::2] if rows == 1 else (openings * rows)[: max(rows, LEAST_REQUESTS)]
    with ThreadPoolExecutor(rows) as threads:

        def ask(some: list[list[Message]]) -> list[Answer]:
            return list(threads.map(lambda messages: server.answer(messages, sampling, NEW_TOKENS), some))

        begun = server.reading()
        before = server.reading_after(begun, ask(chosen[: max(2, rows)]))
        started = time.perf_counter()
        answers = ask(chosen)
        seconds = time.perf_counter() - started
    after = server.reading_after(before, answers)
    drafted = after.acceptance.since(before.acceptance) if after.acceptance else None
    tokens = sum(answer.new_tokens for answer in answers)
    return {
        "rows": rows, "T": temperature, "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1),
        "tau": drafted.tau if drafted else None,
    }  # fmt: skip


def named(given: str) -> tuple[str, Server]:
    """A server of the command line. Raises ConfigError where it has no name, Unreachable where it does not answer."""
    name, _, url = given.partition("=")
    if not url:
        raise ConfigError(f"{given!r} is no NAME=URL, such as plain=http://127.0.0.1:8100")
    return name, Server(url)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--benchmarks", type=Path, nargs="+", required=True)
    parser.add_argument("--each", type=int, default=8, help="questions of each benchmark")
    options = parser.parse_args()
    servers = dict(named(given) for given in options.servers)
    files = tuple(str(file) for file in options.benchmarks)
    questions = load_benchmarks(EvaluationConfig(benchmarks=files, max_questions=options.each))
    openings = [opening(question) for question in questions]
    for rows, temperature in KINDS:
        for name, server in servers.items():
            print(json.dumps({"side": name} | measured(server, openings, rows, temperature)), flush=True)


if __name__ == "__main__":
    in_one_sentence(main)
