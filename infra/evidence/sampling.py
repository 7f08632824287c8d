"""Speculative decoding of sampled answers: candidates that share the target's noise beside the ways that do not.

    python infra/evidence/sampling.py DRAFT QUESTIONS.jsonl … [--device cuda]

Ways to draft: `likeliest` tokens of the draft; `coupled` ones, with the score that the fitted sharpness and width give,
with both left at 1 (`unfitted`), or with plain confidence as score; `rsd`, recursive rejection over tokens drawn
without replacement. Every question is decoded plainly and by every way, at T = 0, 0.6, 0.7 (top-p 0.95) and 1, in trees
6/10/60 and 3/4/12 and a chain of 3. Prints JSON: tokens per cycle τ with bootstrap intervals over questions, its
ratio to `likeliest`, tokens/s beside plain decoding's, and the median cycle at T = 1 over that at T = 0.

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

from hass_core.config import SamplingConfig, TargetConfig, TreeConfig
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import Generation, StopRule
from hass_core.decoding.decoder import Decoder, PlainDecoder, TreeDecoder
from hass_core.decoding.drafter import Children, Drafter
from hass_core.decoding.replay import Recording, replay
from hass_core.decoding.rivals.recursive_rejection import RecursiveRejectionDecoder
from hass_core.decoding.sampler import Sampler
from hass_core.decoding.session import prefill
from hass_core.decoding.tree import Tree, TreeShape
from hass_core.draft_model.checkpoint import Draft, load_draft
from hass_core.evaluation.statistics import bootstrap
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import Runner, make_runner

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


@dataclass
class Counted:
    """Of each question tokens and cycles; whole decoding also tells seconds, and each cycle's."""

    tokens: list[int]
    cycles: list[int]
    seconds: list[float]
    cycle_seconds: list[float]

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {"tau": bootstrap(_tau, *self.columns).model_dump()}
        if self.seconds:
            found["tokens_per_second"] = round(sum(self.tokens) / sum(self.seconds), 1)
            found["cycle_ms"] = round(1000 * statistics.median(self.cycle_seconds), 3)
        return found

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.tokens), np.array(self.cycles)


def _tau(tokens: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    return tokens.sum(-1) / cycles.sum(-1)


def _gain(tokens: np.ndarray, cycles: np.ndarray, other_tokens: np.ndarray, other_cycles: np.ndarray) -> np.ndarray:
    return _tau(tokens, cycles) / _tau(other_tokens, other_cycles)


def _speed_up(tokens: np.ndarray, seconds: np.ndarray, other_tokens: np.ndarray, other: np.ndarray) -> np.ndarray:
    return _tau(tokens, seconds) / _tau(other_tokens, other)


def decoded(
    decoder: Decoder, prompts: list[list[int]], sampling: SamplingConfig, count: int, stop: StopRule
) -> Counted:
    """Question by question, after the longest, which sizes the session and compiles what it needs."""
    decoder.generate([max(prompts, key=len)], sampling, count, stop, seed=0)
    found: list[Generation] = [
        decoder.generate([prompt], sampling, count, stop, seed=number)[0] for number, prompt in enumerate(prompts)
    ]
    return Counted(
        [len(g.token_ids) - 1 for g in found],
        [max(1, len(g.cycles)) for g in found],
        [g.decode_seconds for g in found],
        [timing.total_seconds for g in found for timing in g.timings],
    )


def recorded(
    runner: Runner, prompts: list[list[int]], sampling: SamplingConfig, count: int, stop: StopRule
) -> list[Recording]:
    """Answers sampled plainly as one batch, with their features."""
    answers = []
    generations = PlainDecoder(runner).generate(prompts, sampling, count, stop, seed=0)
    with torch.inference_mode():
        for prompt, generation in zip(prompts, generations, strict=True):
            ids = torch.tensor([prompt + generation.token_ids], device=runner.device)
            cache = runner.new_cache(1, ids.shape[1])
            features = prefill(runner, ids, [ids.shape[1]], cache)[0]
            answers.append(Recording(ids[0], features.clone(), len(prompt)))
    return [answer for answer in answers if len(answer.token_ids) - answer.start > 1]


def replayed(drafter: Drafter, answers: list[Recording], head: Tensor, sampling: SamplingConfig) -> Counted:
    counts = replay(drafter, answers, head, sampling)
    return Counted([sum(c) + len(c) for c in counts], [len(c) for c in counts], [], [])


def measured(target: Target, draft: Draft, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, Any]:
    """By setting and tree, what every way gives."""
    runner, stop, found = make_runner(target), StopRule.of(target), {}
    for name in options.settings or SETTINGS:
        sampling = SETTINGS[name]
        answers = recorded(runner, prompts, sampling, options.tokens, stop) if options.replay else []
        plain = None if options.replay else decoded(PlainDecoder(runner), prompts, sampling, options.tokens, stop)
        for tree in options.trees or TREES:
            shape, ways = TreeShape.of(TREES[tree], draft.head.size), {}
            for way, drafter in DRAFTERS.items():
                if way not in options.ways:
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
    found = counted.record() | {"gain": bootstrap(_gain, *counted.columns, *likeliest.columns).model_dump()}
    if plain is None:
        return found
    columns = [np.array(c) for c in (counted.tokens, counted.seconds, plain.tokens, plain.seconds)]
    return found | {
        "speed_up": bootstrap(_speed_up, *columns).model_dump(),
        "plain_cycle_ms": plain.record()["cycle_ms"],
    }


def prompts_of(target: Target, files: list[Path], each: int) -> list[list[int]]:
    """The first turns of `each` evenly spaced questions of every file."""
    found = []
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows[:: max(1, len(rows) // each)][:each]:
            found.append(encode_prompt(target.tokenizer, [{"role": "user", "content": row["turns"][0]}]))
    return found


def main() -> None:
    """Parse the command line, measure, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", type=Path)
    parser.add_argument("questions", type=Path, nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--each", type=int, default=8, help="questions of each file")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--trees", nargs="+", choices=TREES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="likeliest is always one of them")
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.ways = {"likeliest", *options.ways}
    target = load_target(TargetConfig(device=options.device, dtype=options.dtype))
    prompts = prompts_of(target, options.questions, options.each)
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
