"""Speculative decoding of sampled answers: candidates that share the target's noise beside the ways that do not.

    python infra/evidence/sampling.py DRAFT BENCHMARK … [--device cuda]

A BENCHMARK is what evaluation.benchmarks takes: heldout, a file of questions, NAME=FILE.

Ways to draft: `likeliest` tokens of the draft; `coupled` ones, with the score that the fitted sharpness and width give,
with both left at 1 (`unfitted`), or with plain confidence as score; `rsd`, recursive rejection over tokens drawn
without replacement. Every question is decoded plainly and by every way, at T = 0, 0.6, 0.7 (top-p 0.95) and 1, in trees
6/10/60 and 3/4/12 and a chain of 3. At T = 0 the
two first ways are one, and only it is measured. Prints JSON: tokens per cycle τ with bootstrap intervals over
questions and of each benchmark, its ratio to `likeliest`, tokens/s beside plain decoding's, and the median cycle.

With `--replay` only τ is measured: answers are sampled plainly in one batch and the cycles replayed over them, which
needs no pass of the target (`hass_core.decoding.replay`; rsd has no such shortcut and is left out).
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hass_core.config import EvaluationConfig, SamplingConfig, TargetConfig, TreeConfig
from hass_core.decoding.answers import Generation, StopRule
from hass_core.decoding.decoder import Decoder, PlainDecoder, TreeDecoder
from hass_core.decoding.drafter import Children, Drafter
from hass_core.decoding.replay import Recording, replay
from hass_core.decoding.rivals.recursive_rejection import RecursiveRejectionDecoder
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.tree import Tree, TreeShape
from hass_core.draft_model.checkpoint import Draft, load_draft
from hass_core.evaluation.benchmarks import Question, load_benchmarks
from hass_core.evaluation.measure import encode, opening
from hass_core.evaluation.statistics import bootstrap
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import Runner, make_runner
from hass_core.target_model.taps import Taps

TREES = {
    "6/10/60": TreeConfig(),
    "3/4/12": TreeConfig(depth=3, top_k=4, nodes=12),
    "chain 3": TreeConfig(kind="chain", depth=3),
}
SETTINGS = {
    "0": SamplingConfig(),
    "0.6": SamplingConfig(temperature=0.6),
    "0.7, top-p 0.95": SamplingConfig(temperature=0.7, top_p=0.95),
    "1": SamplingConfig(temperature=1.0),
}
UNFITTED = {1.0: (1.0, 1.0)}


class Likeliest(Drafter):
    """Drafts what is likeliest before the noise is known."""

    def grow(self, cache: Any, root: Tensor, estimate: Tensor, sampler: Sampler, fixed: Any = None) -> Tree:
        return super().grow(cache, root, estimate, self._blind, fixed)

    _blind = Sampler(SamplingConfig(), 1, 1, torch.device("cpu"))


class Unfitted(Drafter):
    """Coupled, with the noise taken for all that is unknown."""

    def __init__(self, draft: Draft, shape: TreeShape):
        super().__init__(draft, shape)
        self.calibration = UNFITTED


class PlainConfidence(Drafter):
    """Coupled candidates, in a tree chosen by their probabilities before the noise."""

    def _children(
        self, lengths: Tensor, sampler: Sampler, features: Tensor, ahead: int, path: Tensor | None = None
    ) -> Children:
        chosen = super()._children(lengths, sampler, features, ahead, path).token_ids
        q = (self._product.of_few_rows(features).float() / (sampler.temperature or 1.0)).log_softmax(-1)
        return Children(q.gather(-1, chosen), chosen)


DRAFTERS: dict[str, Callable[[Draft, TreeShape], Drafter]] = {
    "likeliest": Likeliest, "coupled": Drafter, "unfitted": Unfitted, "plain confidence": PlainConfidence,
}  # fmt: skip
WAYS = [*DRAFTERS, "rsd"]
Asked = tuple[str, list[int]]  # a question's benchmark and its prompt


@dataclass
class Counted:
    """Of each question tokens and cycles; whole decoding also tells seconds, and each cycle's."""

    benchmarks: list[str]
    tokens: list[int]
    cycles: list[int]
    seconds: list[float]
    cycle_seconds: list[float]

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {"tau": bootstrap(_tau, *self.columns).model_dump(), "tau_of": self._tau_of()}
        if self.seconds:
            found["tokens_per_second"] = round(sum(self.tokens) / sum(self.seconds), 1)
            found["cycle_ms"] = round(1000 * statistics.median(self.cycle_seconds), 3)
        return found

    def _tau_of(self) -> dict[str, float]:
        tokens, cycles = self.columns
        chosen = {name: [own == name for own in self.benchmarks] for name in dict.fromkeys(self.benchmarks)}
        return {name: round(float(_tau(tokens[own], cycles[own])), 3) for name, own in chosen.items()}

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.tokens), np.array(self.cycles)


def _tau(tokens: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    return tokens.sum(-1) / cycles.sum(-1)


def gain(tokens: np.ndarray, cycles: np.ndarray, other_tokens: np.ndarray, other_cycles: np.ndarray) -> np.ndarray:
    return _tau(tokens, cycles) / _tau(other_tokens, other_cycles)


def _speed_up(tokens: np.ndarray, seconds: np.ndarray, other_tokens: np.ndarray, other: np.ndarray) -> np.ndarray:
    return _tau(tokens, seconds) / _tau(other_tokens, other)


def decoded(decoder: Decoder, asked: list[Asked], sampling: SamplingConfig, count: int, stop: StopRule) -> Counted:
    """Question by question, after the longest, which sizes the session and compiles what it needs."""
    prompts = [prompt for _, prompt in asked]
    decoder.generate([max(prompts, key=len)], sampling, count, stop, seed=0)
    found: list[Generation] = [
        decoder.generate([prompt], sampling, count, stop, seed=number)[0] for number, prompt in enumerate(prompts)
    ]
    return Counted(
        [name for name, _ in asked],
        [len(g.token_ids) - 1 for g in found],
        [max(1, len(g.cycles)) for g in found],
        [g.decode_seconds for g in found],
        [timing.total_seconds for g in found for timing in g.timings],
    )


def recorded(
    runner: Runner,
    asked: list[Asked],
    sampling: SamplingConfig,
    count: int,
    stop: StopRule,
    layers: tuple[int, ...] = (),
) -> list[tuple[str, Recording]]:
    """Answers sampled plainly as one batch, with their benchmark, features and the states after `layers`, if any."""
    answers = []
    generations = PlainDecoder(runner).generate([prompt for _, prompt in asked], sampling, count, stop, seed=0)
    with torch.inference_mode():
        for (name, prompt), generation in zip(asked, generations, strict=True):
            if len(generation.token_ids) < 2:
                continue
            ids = torch.tensor([prompt + generation.token_ids], device=runner.device)
            cache = runner.new_cache(1, ids.shape[1])
            taps = Taps(layers) if layers else None
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            features = runner.forward(ids, positions, cache, taps=taps)[0].clone()
            states = taps.joined()[0].clone() if taps else None
            answers.append((name, Recording(ids[0], features, len(prompt), states)))
    return answers


def replayed(drafter: Drafter, answers: list[tuple[str, Recording]], head: Tensor, sampling: SamplingConfig) -> Counted:
    counts = replay(drafter, [answer for _, answer in answers], head, sampling)
    return Counted([name for name, _ in answers], [sum(c) + len(c) for c in counts], [len(c) for c in counts], [], [])


def measured(target: Target, draft: Draft, prompts: list[Asked], options: argparse.Namespace) -> dict[str, Any]:
    """By setting and tree, what every way gives."""
    runner, stop, found = make_runner(target), StopRule.of(target), {}
    for name in options.settings or SETTINGS:
        sampling = SETTINGS[name]
        answers = recorded(runner, prompts, sampling, options.tokens, stop) if options.replay else []
        plain = None if options.replay else decoded(PlainDecoder(runner), prompts, sampling, options.tokens, stop)
        for tree in options.trees or TREES:
            shape, ways = TreeShape.of(TREES[tree], draft.head.size), {}
            for way, drafter in DRAFTERS.items():
                if way not in options.ways or (way == "coupled" and not sampling.temperature):
                    continue
                if options.replay:
                    ways[way] = replayed(drafter(draft, shape), answers, target.head, sampling)
                else:
                    decoder = TreeDecoder(runner, drafter(draft, shape), way)
                    ways[way] = decoded(decoder, prompts, sampling, options.tokens, stop)
            if "rsd" in options.ways and not options.replay and sampling.temperature:
                rival = RecursiveRejectionDecoder(runner, draft, TREES[tree])
                ways["rsd"] = decoded(rival, prompts, sampling, options.tokens, stop)
            found[f"T = {name}, {tree}"] = {way: _compared(c, ways["likeliest"], plain) for way, c in ways.items()}
            print(name, tree, {way: round(c.record()["tau"]["value"], 3) for way, c in ways.items()}, flush=True)
    return found


def _compared(counted: Counted, likeliest: Counted, plain: Counted | None) -> dict[str, Any]:
    found = counted.record() | {"gain": bootstrap(gain, *counted.columns, *likeliest.columns).model_dump()}
    if plain is None:
        return found
    columns = [np.array(c) for c in (counted.tokens, counted.seconds, plain.tokens, plain.seconds)]
    return found | {
        "speed_up": bootstrap(_speed_up, *columns).model_dump(),
        "plain_cycle_ms": plain.record()["cycle_ms"],
    }


def prompts_of(target: Target, benchmarks: list[str], each: int) -> list[Asked]:
    """The first turns of `each` evenly spaced questions of every benchmark."""

    def first(question: Question) -> Asked:
        return question.benchmark, encode(target, question, opening(question))

    config = EvaluationConfig(benchmarks=tuple(benchmarks), max_questions=each)
    return [first(question) for question in load_benchmarks(config)]


def main() -> None:
    """Parse the command line, measure, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", type=Path)
    parser.add_argument("benchmarks", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--each", type=int, default=8, help="questions of each benchmark")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--trees", nargs="+", choices=TREES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="likeliest is always one of them")
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.ways = {"likeliest", *options.ways}
    target = load_target(TargetConfig(device=options.device, dtype=options.dtype))
    prompts = prompts_of(target, options.benchmarks, options.each)
    name = (
        torch.cuda.get_device_name() if options.device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    )
    record = {
        "device": name, "dtype": str(target.dtype), "questions": len(prompts), "tokens": options.tokens,
        "results": measured(target, load_draft(options.draft, target), prompts, options),
    }  # fmt: skip
    text = json.dumps(record | provenance(), indent=1)
    print(text) if options.out is None else options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
