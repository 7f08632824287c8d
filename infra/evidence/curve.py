"""Train several recipes on the same features and write how the held-out chain acceptance grows with tokens seen.

    python infra/evidence/curve.py CONVERSATIONS.jsonl.gz OUT.json --store DIR \
        [--recipe NAME key=value …] [--seconds 500]

CONVERSATIONS holds the target's own answers in ShareGPT or messages form, which are taken as they are. Recipes run one
after the other until the time is spent; OUT holds one record for each, with the validation curve and the settings.
"""

import argparse
import gzip
import json
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hass_core.config import RunConfig, load_config
from hass_core.data.responses import RESPONSES_SCHEMA, part_name
from hass_core.features.extract import extract_features
from hass_core.provenance import provenance
from hass_core.store import Artifact, Store
from hass_core.target.loader import load_target
from hass_core.training.train import train_draft


def given_responses(store: Store, path: Path) -> Artifact:
    """The conversations of a file as a responses stage."""
    folder = store.stage("responses", {"given": path.name, "bytes": path.stat().st_size})
    if done := folder.artifact():
        return done
    with gzip.open(path, "rt") as lines:
        rows = [_row(json.loads(line)) for line in lines]
    with folder.writing(part_name(0)) as file:
        pq.write_table(pa.Table.from_pylist(rows, RESPONSES_SCHEMA), file.path)
        file.rows = len(rows)
    return folder.finish({"conversations": len(rows)})


def _row(record: dict) -> dict:
    messages = record["conversations"]
    answers = [[] for message in messages if message["role"] == "assistant"]
    return {
        "id": record["id"], "category": "", "source": "given", "messages": messages, "answer_token_ids": answers,
        "finished": record["finished"], "num_new_tokens": 0, "temperature": 0.7,
    }  # fmt: skip


def curve(config: RunConfig, features: Artifact, store: Store, keep: Path | None) -> dict:
    """Train one recipe; its settings, its summary and its validation records."""
    started = time.perf_counter()
    draft = train_draft(config, features, store, load_target(config.target))
    folder = store.open(draft)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(folder.local_path(name), keep / name)
    records = [json.loads(line) for line in folder.read_text("metrics.jsonl").splitlines()]
    return {
        "name": config.name,
        "seconds": round(time.perf_counter() - started, 1),
        "training": config.training.model_dump(mode="json"),
        "draft": config.draft.model_dump(mode="json"),
        "summary": draft.summary,
        "validation": [record for record in records if "val/tau" in record],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="smollm2-gpu")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--set", action="append", default=[], help="setting for all recipes")
    parser.add_argument("--keep", type=Path, help="folder for the drafts")
    parser.add_argument("--recipe", action="append", nargs="+", default=[], metavar=("NAME", "key=value"))
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    base = [f'store="{options.store}"', *options.set]
    store = Store(options.store)
    config = load_config(options.config, base)
    features = extract_features(
        config, given_responses(store, options.conversations), store, load_target(config.target)
    )
    print("features", features.summary, flush=True)
    result = {"conversations": options.conversations.name, "features": features.summary, **provenance(), "recipes": []}
    for name, *overrides in options.recipe:
        if time.perf_counter() > end:
            break
        recipe = load_config(options.config, [*base, f'name="{name}"', *overrides])
        record = curve(recipe, features, store, options.keep and options.keep / name)
        result["recipes"].append(record)
        options.out.write_text(json.dumps(result, indent=1))
        print(name, record["seconds"], record["summary"], flush=True)


if __name__ == "__main__":
    main()
