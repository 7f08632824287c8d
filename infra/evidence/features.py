"""Time the features stage on given conversations, as if the target had just answered them.

    python infra/evidence/features.py CONVERSATIONS.jsonl.gz --store DIR [--repeat 4] [--config smollm2-gpu] [--set …]

Prints one JSON line: tokens, seconds of the whole stage from the loaded target to the manifest, tokens a second, beside
those of the target's own pass alone and of capturing alone (`hass bench features`) in the same process. The file has
one conversation a line, with a list of messages under "conversations".
"""

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hass_core.bench.features import bench_features
from hass_core.config import load_config
from hass_core.data.responses import RESPONSES_SCHEMA
from hass_core.features.extract import extract_features
from hass_core.store import Artifact, Store
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import load_target


def responses_of(path: Path, repeat: int, shard: int, store: Store) -> Artifact:
    """The conversations as a responses stage, `repeat` times under new names."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        rows = [_row(json.loads(line)) for line in lines]
    rows = [row | {"id": f"{row['id']}-{i}"} for i in range(repeat) for row in rows]
    folder = store.stage("responses", {"file": path.name, "repeat": repeat, "shard": shard})
    for number, part in enumerate(_parts(rows, shard)):
        with folder.writing(f"part-{number:05d}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(part, RESPONSES_SCHEMA), file.path)
            file.rows = len(part)
    return folder.finish({})


def _row(record: dict) -> dict:
    messages = record["conversations"]
    answers = sum(message["role"] == "assistant" for message in messages)
    known = {"id": record["id"], "messages": messages, "answer_token_ids": [[]] * answers}
    return known | {"category": "", "source": "", "finished": True, "num_new_tokens": 0, "temperature": 0.0}


def _parts(rows: list[dict], size: int) -> Iterator[list[dict]]:
    return (rows[at : at + size] for at in range(0, len(rows), size))


def main() -> None:
    """Parse the command line, measure, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--config", default="smollm2-gpu")
    parser.add_argument("--set", action="append", default=[], help="key=value of the settings")
    options = parser.parse_args()
    config = load_config(options.config, [f'store="{options.store}"', *options.set])
    store, target = Store(options.store), load_target(config.target)
    responses = responses_of(options.conversations, options.repeat, config.responses.conversations_per_shard, store)
    started = time.perf_counter()
    features = extract_features(config, responses, store, target)
    seconds = time.perf_counter() - started
    tokens = features.summary["tokens"]
    speed = bench_features(target=target, folder=Path(options.store))
    alone, capture = speed.prefill_tokens_per_second or 0.0, speed.capture_tokens_per_second or 0.0
    record = {
        "conversations": features.summary["conversations"], "tokens": tokens,
        "gigabytes": round(features.summary["bytes"] / 1e9, 2),
        "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds),
        "prefill_tokens_per_second": round(alone), "share_of_prefill": round(tokens / seconds / alone, 3),
        "capture_tokens_per_second": round(capture),
        "max_tokens_per_batch": config.features.max_tokens_per_batch,
    }  # fmt: skip
    print(json.dumps(record | provenance()))


if __name__ == "__main__":
    main()
