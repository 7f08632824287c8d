"""How many tokens a draft needs on new data when it continues from the champion, and when it begins anew.

    python infra/evidence/warm_start.py OUT.json --config smollm2-cpu --store DIR [--conversations FILE] [--set …]

The answers, or the conversations of FILE as if the target had just answered them, are cut in two: last week's, which
the champion is trained on, and this week's. On this week's a draft is trained from the start and another from the
champion, by the same settings. OUT holds both curves (`val/tau` on this week's held-out answers against tokens seen),
the champion's τ there, and where the one that continues reaches what the other ends with.
"""

import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hass_core.config import RunConfig, load_config, parse_config
from hass_core.data.prompts import collect_prompts
from hass_core.data.responses import generate_responses
from hass_core.evaluation.evaluate import local_draft
from hass_core.features.extract import extract_features
from hass_core.settings import apply_override
from hass_core.store import Artifact, Store
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import Target, load_target
from hass_core.training.train import train_draft
from infra.evidence.features import responses_of


def halves(responses: Artifact, store: Store) -> list[Artifact]:
    """The first and the second half of the answers, each as a finished stage."""
    folder = store.open(responses)
    manifest = folder.manifest()
    assert manifest is not None
    names = sorted(name for name in manifest.files if name.startswith("part-"))
    rows = pa.concat_tables([pq.read_table(folder.local_path(name)) for name in names])
    middle = len(rows) // 2
    made = []
    for number, part in enumerate((rows.slice(0, middle), rows.slice(middle))):
        stage = store.stage("responses", {"half": number, "of": responses.digest})
        if (done := stage.artifact()) is None:
            with stage.writing("part-00000.parquet") as file:
                pq.write_table(part, file.path)
                file.rows = len(part)
            done = stage.finish({"conversations": len(part)})
        made.append(done)
    return made


def curve(draft: Artifact, store: Store) -> list[dict[str, float]]:
    """Tokens seen and τ at every validation."""
    records = [json.loads(line) for line in store.open(draft).read_text("metrics.jsonl").splitlines()]
    return [{"tokens": r["tokens_seen"], "tau": round(r["val/tau"], 4)} for r in records if "val/tau" in r]


def trained(config: RunConfig, features: Artifact, store: Store, target: Target, *changes: str) -> Artifact:
    """A draft by the settings with changes."""
    values = config.model_dump(mode="json")
    for change in changes:
        apply_override(values, change)
    return train_draft(parse_config(values), features, store, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="smollm2-cpu")
    parser.add_argument("--store", required=True)
    parser.add_argument("--conversations", type=Path, help="JSON Lines, a list of messages under `conversations`")
    parser.add_argument("--set", action="append", default=[], help="setting for all drafts")
    options = parser.parse_args()
    config, store = load_config(options.config, [f'store="{options.store}"', *options.set]), Store(options.store)
    target = load_target(config.target)
    if options.conversations:
        responses = responses_of(options.conversations, 1, config.responses.conversations_per_shard, store)
    else:
        responses = generate_responses(config, collect_prompts(config, store, target), store, target)
    last_week, this_week = (extract_features(config, half, store, target) for half in halves(responses, store))
    champion = trained(config, last_week, store, target)
    start = f'draft.warm_start="{local_draft(store.open(champion))}"'
    still = trained(config, this_week, store, target, start, "training.max_steps=1", "training.lr_peak=1e-12")
    anew = curve(trained(config, this_week, store, target), store)
    continued = curve(trained(config, this_week, store, target, start), store)
    goal = max(point["tau"] for point in anew)
    reached = next((point["tokens"] for point in continued if point["tau"] >= goal), None)
    result = {
        **provenance(),
        "threads": torch.get_num_threads(),
        "settings": options.set,
        "features": {"last week": dict(last_week.summary), "this week": dict(this_week.summary)},
        "champion on last week": curve(champion, store),
        "champion on this week, untrained": curve(still, store)[-1]["tau"],
        "anew": anew,
        "continued": continued,
        "goal": goal,
        "tokens to the goal": {"anew": next(p["tokens"] for p in anew if p["tau"] >= goal), "continued": reached},
    }
    options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["tokens to the goal"]), goal)


if __name__ == "__main__":
    main()
