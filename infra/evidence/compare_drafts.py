"""Drafts of one target on the same answers: what another objective, architecture or more data is worth.

    python infra/evidence/compare_drafts.py NAME=DRAFT … --benchmarks mt_bench.jsonl humaneval.jsonl gsm8k.jsonl \
        [--each 20] [--device cuda] --out RECORD.json

The target answers every question once for each setting, and the cycles of each draft are replayed over these answers
(`hass_core.decoding.replay`), in a tree 6/10/60 and as a chain of 3. At T > 0 both with candidates that share the
target's noise (`coupled`, what this decoder does) and with the draft's `likeliest` tokens (what engines do by default).
The record holds tokens per cycle τ with bootstrap intervals over questions, and for every draft but the first the ratio
of its τ to the first one's, question by question.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hass_core.config import TargetConfig
from hass_core.decoding.answers import StopRule
from hass_core.decoding.tree import TreeShape
from hass_core.draft_model.checkpoint import Draft, load_draft
from hass_core.evaluation.statistics import bootstrap
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import make_runner
from infra.evidence.sampling import DRAFTERS, SETTINGS, TREES, Asked, gain, prompts_of, recorded, replayed

WAYS = ("coupled", "likeliest")


def taps_of(drafts: dict[str, Draft]) -> tuple[int, ...]:
    """The layers whose states the drafts read, which must be the same for all that read any."""
    found = {draft.model.taps for draft in drafts.values()} - {()}
    if len(found) > 1:
        raise SystemExit(f"the drafts read different layers of the target: {sorted(found)}")
    return next(iter(found), ())


def compared(
    target: Target, drafts: dict[str, Draft], prompts: list[Asked], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """By setting, tree and way, what every draft makes."""
    runner, stop, found = make_runner(target), StopRule.of(target), {}
    for setting in options.settings:
        sampling = SETTINGS[setting]
        tapped = recorded(runner, prompts, sampling, options.tokens, stop, taps_of(drafts))
        plain = [(benchmark, replace(answer, taps=None)) for benchmark, answer in tapped]
        for tree in options.trees:
            for way in WAYS if sampling.temperature else ("likeliest",):
                first, records = None, {}
                for name, draft in drafts.items():
                    drafter = DRAFTERS[way](draft, TreeShape.of(TREES[tree], draft.head.size))
                    answers = tapped if draft.model.taps else plain
                    counted = replayed(drafter, answers, target.head, sampling)
                    first = first or counted
                    ratio = bootstrap(gain, *counted.columns, *first.columns).model_dump()
                    records[name] = counted.record() | ({} if counted is first else {"over_first": ratio})
                found[f"T = {setting}, {tree}, {way}"] = records
                taus = {name: round(record["tau"]["value"], 3) for name, record in records.items()}
                print(setting, tree, way, taus, flush=True)
    return found


def main() -> None:
    """Parse the command line, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafts", nargs="+", metavar="NAME=DRAFT")
    parser.add_argument("--benchmarks", nargs="+", required=True)
    parser.add_argument("--each", type=int, default=20, help="questions of each benchmark")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["0", "0.7, top-p 0.95", "1"])
    parser.add_argument("--trees", nargs="+", choices=TREES, default=["6/10/60", "chain 3"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    target = load_target(TargetConfig(device=options.device))
    drafts = {
        name: load_draft(Path(folder), target)
        for name, _, folder in (given.partition("=") for given in options.drafts)
    }  # fmt: skip
    prompts = prompts_of(target, options.benchmarks, options.each)
    on_gpu = options.device.startswith("cuda")
    record = {
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(target.dtype), "questions": len(prompts), "tokens": options.tokens,
        "results": compared(target, drafts, prompts, options),
    }  # fmt: skip
    options.out.write_text(json.dumps(record | provenance(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
