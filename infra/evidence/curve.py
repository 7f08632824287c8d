"""Train several recipes on the same features and write how the held-out acceptance grows with the tokens seen.

    python infra/evidence/curve.py OUT.json --config smollm2-gpu --store DIR \
        --recipe hass "training.align_steps=3" --recipe eagle2 training.align_steps=1 training.top_k_weight=0 \
        [--questions mt_bench=FILE …] [--keep DIR]

Prompts, answers and features are made once and shared. OUT holds, for each recipe, its settings, its validation records
(chain and tree acceptance against tokens seen), and tokens per cycle of greedy tree decoding on the questions with
bootstrap intervals.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from hass_core.config import EvaluationConfig, RunConfig, SamplingConfig, TreeConfig, load_config
from hass_core.data.prompts import collect_prompts
from hass_core.data.responses import generate_responses
from hass_core.data.templates import encode_prompt
from hass_core.decoding.answers import StopRule
from hass_core.decoding.decoder import SpeculativeDecoder
from hass_core.draft_model.checkpoint import load_draft
from hass_core.evaluation.benchmarks import load_benchmarks
from hass_core.features.extract import extract_features
from hass_core.store import Artifact, Store
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import Target, load_target
from hass_core.target_model.runner import make_runner
from hass_core.training.train import train_draft

TREE = TreeConfig(depth=6, top_k=10, nodes=60)
ROWS, NEW_TOKENS, DRAWS = 10, 128, 1000


def features_of(config: RunConfig, store: Store, target: Target) -> tuple[Artifact, dict[str, dict]]:
    """The features that all recipes share, and what each stage before training says of itself."""
    prompts = _timed("prompts", lambda: collect_prompts(config, store, target))
    responses = _timed("responses", lambda: generate_responses(config, prompts, store, target))
    features = _timed("features", lambda: extract_features(config, responses, store, target))
    return features, {artifact.stage: dict(artifact.summary) for artifact in (prompts, responses, features)}


def recipe_record(config: RunConfig, features: Artifact, store: Store, target: Target, questions: list) -> dict:
    """Train one recipe; its settings, summary, validation records, tokens per cycle on the questions."""
    started = time.perf_counter()
    draft = train_draft(config, features, store, target)
    folder = store.open(draft)
    records = [json.loads(line) for line in folder.read_text("metrics.jsonl").splitlines()]
    return {
        "name": config.name,
        "seconds": round(time.perf_counter() - started, 1),
        "training": config.training.model_dump(mode="json"),
        "draft": config.draft.model_dump(mode="json"),
        "summary": draft.summary,
        "validation": [record for record in records if "val/tau" in record],
        "decoding": decoded(target, Path(folder.local_path("config.json")).parent, questions),
    }


def decoded(target: Target, folder: Path, questions: list) -> dict[str, dict]:
    """Tokens per cycle by benchmark, first turns, greedy, with 95 % intervals over the questions."""
    decoder = SpeculativeDecoder(make_runner(target), load_draft(folder, target), TREE)
    by_benchmark: dict[str, list[list[int]]] = {}
    for question in questions:
        prompt = encode_prompt(target.tokenizer, question.messages[:1])
        by_benchmark.setdefault(question.benchmark, []).append(prompt)
    return {name: _tau(decoder, prompts, StopRule.of(target)) for name, prompts in by_benchmark.items()}


def _tau(decoder: SpeculativeDecoder, prompts: list[list[int]], stop: StopRule) -> dict:
    full = prompts[: len(prompts) // ROWS * ROWS]
    batches = [full[i : i + ROWS] for i in range(0, len(full), ROWS)]
    answers = [a for batch in batches for a in decoder.generate(batch, SamplingConfig(), NEW_TOKENS, stop)]
    cycles = torch.tensor([[len(a.cycles), sum(c.accepted + 1 for c in a.cycles)] for a in answers if a.cycles])
    drawn = cycles[torch.randint(len(cycles), (DRAWS, len(cycles)), generator=torch.Generator().manual_seed(0))].sum(1)
    low, high = (drawn[:, 1] / drawn[:, 0]).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"tau": float(cycles[:, 1].sum() / cycles[:, 0].sum()), "low": low, "high": high, "questions": len(cycles)}


def _timed(name: str, stage) -> Artifact:
    started = time.perf_counter()
    artifact = stage()
    print(name, round(time.perf_counter() - started, 1), "s", artifact.summary, flush=True)
    return artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="smollm2-gpu")
    parser.add_argument("--store", required=True)
    parser.add_argument("--set", action="append", default=[], help="setting for all recipes")
    parser.add_argument("--keep", type=Path, help="folder for the drafts")
    parser.add_argument("--questions", action="append", default=[], help="benchmark, as in evaluation.benchmarks")
    parser.add_argument("--max-questions", type=int, default=80, help="of each benchmark")
    parser.add_argument("--recipe", action="append", nargs="+", default=[], metavar=("NAME", "key=value"))
    options = parser.parse_args()
    base = [f'store="{options.store}"', *options.set]
    store, config = Store(options.store), load_config(options.config, base)
    target = load_target(config.target)
    features, stages = features_of(config, store, target)
    asked = EvaluationConfig(benchmarks=tuple(options.questions), max_questions=options.max_questions)
    questions = load_benchmarks(asked) if options.questions else []
    result = {"stages": stages, "tree": TREE.model_dump(mode="json"), **provenance(), "recipes": []}
    options.out.write_text(json.dumps(result, indent=1))
    for name, *overrides in options.recipe:
        recipe = load_config(options.config, [*base, f'name="{name}"', *overrides])
        record = recipe_record(recipe, features, store, target, questions)
        result["recipes"].append(record)
        options.out.write_text(json.dumps(result, indent=1))
        print(name, record["seconds"], record["summary"], record["decoding"], flush=True)
        if options.keep:
            from_folder = Path(
                store.open(train_draft(recipe, features, store, target)).local_path("config.json")
            ).parent
            shutil.copytree(from_folder, options.keep / name, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
