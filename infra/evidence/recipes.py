"""Train drafts by several recipes on the same conversations, as if the target had just answered them.

    python infra/evidence/recipes.py OUT.jsonl CONVERSATIONS.jsonl.gz --store DIR --config smollm2-gpu \
        [--set section.key=value …] --recipe hass --recipe eagle2 training.align_steps=1 training.top_k_weight=0

OUT gets a line a recipe: its changes, where its draft is, what it says of itself and its validations (chain and tree
acceptance against tokens seen). Features are made once for all that can share them, and reused from the store; without
a recipe nothing else is done. `compare_drafts.py` then puts the drafts to the same questions.
"""

import argparse
import json
import time
from pathlib import Path

from hass_core.config import load_config
from hass_core.evaluation.evaluate import local_draft
from hass_core.features.extract import extract_features
from hass_core.store import Store
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import load_target
from hass_core.training.train import train_draft
from infra.evidence.features import responses_of
from infra.evidence.warm_start import curve


def main() -> None:
    """Parse the command line, train, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--config", default="smollm2-gpu")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="key=value for every recipe")
    parser.add_argument("--recipe", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"))
    options = parser.parse_args()
    shared = [f'store="{options.store}"', *options.set]
    config, store = load_config(options.config, shared), Store(options.store)
    target = load_target(config.target)
    responses = responses_of(options.conversations, 1, config.responses.conversations_per_shard, store)
    extract_features(config, responses, store, target)
    for name, *changes in options.recipe:
        started, config = time.perf_counter(), load_config(options.config, [*shared, *changes])
        features = extract_features(config, responses, store, target)
        draft = train_draft(config, features, store, target)
        record = {
            "name": name, "changes": [*options.set, *changes], "draft": str(local_draft(store.open(draft))),
            "seconds": round(time.perf_counter() - started, 1), "summary": dict(draft.summary),
            "features": dict(features.summary), "validations": curve(draft, store), **provenance(),
        }  # fmt: skip
        with options.out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        print(name, record["seconds"], draft.summary["val/tau"], flush=True)


if __name__ == "__main__":
    main()
