"""How long training waits for its data, from local disk and from an S3 server on this machine.

    python infra/evidence/reading.py FOLDER --served FOLDER [--tokens 12e6] [--passes 2] [--cold] [--from local s3]

Writes made-up features of a shape into FOLDER, as the features stage would, and trains on them with the settings of the
preset smollm2-gpu and AdamW, whose steps are the fastest; from S3 the same files lie in a SeaweedFS server on loopback
that keeps them under --served (a folder in memory stands for a server as fast as its network). Copies of what was
fetched go to FOLDER. --cold drops the local files from the page cache first.

Prints one JSON line: for each source and pass the share of the time that training waited (`train/waiting_for_data`),
without the first ten steps, in which it compiles.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.fs
import torch

from hass_core.bench.training import SHAPES
from hass_core.config import RunConfig, load_config
from hass_core.features.schema import FeatureInfo
from hass_core.features.writer import FeatureWriter
from hass_core.store import Artifact, Store
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import Target
from hass_core.training.train import train_draft
from infra.evidence.cycle import random_target
from tests.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, seaweedfs

CONVERSATIONS_PER_SHARD, MEAN_TOKENS, HELD_OUT, WRITERS = 512, 330, 100, 4
KEY = {"made": "up"}
SETTINGS = ("draft.start='random'", "training.optimizer='adamw'", "training.tree_answers=0",
            "training.validate_every_steps=100000", "training.checkpoint_every_steps=100000")  # fmt: skip


def make_features(store: Store, shape: str, tokens: int, target: Target) -> Artifact:
    """A finished features stage of about so many tokens; its answers are four fifths of them."""
    sizes, folder = SHAPES[shape], store.stage("features", KEY)
    if done := folder.artifact():
        return done
    fingerprint = {"target_identity": target.fingerprint}
    info = FeatureInfo(hidden_size=sizes["hidden"], encoding="bf16", **fingerprint)
    generator = torch.Generator().manual_seed(0)
    lengths = ((0.4 + 1.2 * torch.rand(tokens // MEAN_TOKENS, generator=generator)) * MEAN_TOKENS).long().tolist()
    features = torch.randn(2 * MEAN_TOKENS, sizes["hidden"], generator=generator).bfloat16()
    token_ids = torch.randint(sizes["vocabulary"], (2 * MEAN_TOKENS,), generator=generator).tolist()

    def write(first: int) -> None:
        name = f"part-{first // CONVERSATIONS_PER_SHARD:05d}.parquet"
        with folder.writing(name) as file, FeatureWriter(file.path, info) as writer:
            for i, length in enumerate(lengths[first : first + CONVERSATIONS_PER_SHARD], first):
                mask = [int(t >= length // 5) for t in range(length)]
                split = "validation" if i < HELD_OUT else "train"
                writer.add(f"c{i}", split, token_ids[:length], mask, features[:length])

    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(write, range(0, len(lengths), CONVERSATIONS_PER_SHARD)))
    return folder.finish({"tokens": sum(lengths)})


@contextmanager
def served(local: Store, folder: Path) -> Iterator[str]:
    """An S3 server that holds a copy of the store; its address."""
    with seaweedfs(folder) as port:
        settings = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        os.environ.update(settings, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_DEFAULT_REGION="us-east-1")
        client = pyarrow.fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        )
        client.create_dir(BUCKET)
        here = pyarrow.fs.LocalFileSystem()
        pyarrow.fs.copy_files(f"{local.root}/features", f"{BUCKET}/store/features", here, client, chunk_size=8 << 20)
        yield f"s3://{BUCKET}/store"


def measured(config: RunConfig, features: Artifact, store: Store, target: Target) -> dict[str, Any]:
    """Train; shares of waiting and rates by pass."""
    started = time.perf_counter()
    draft = train_draft(config, features, store, target)
    seconds = time.perf_counter() - started
    lines = store.open(draft).read_text("metrics.jsonl").splitlines()
    records = [r for r in map(json.loads, lines) if "train/waiting_for_data" in r][1:]
    passes: dict[int, list[dict]] = {}
    for record in records:
        passes.setdefault(1 + int(record["train/epoch"] - 1e-6), []).append(record)
    return {"seconds": round(seconds, 1), "passes": {number: _summary(rows) for number, rows in passes.items()}}


def _summary(records: list[dict]) -> dict[str, Any]:
    waits = [record["train/waiting_for_data"] for record in records]
    rate = len(records) / sum(1 / record["train/tokens_per_second"] for record in records)
    waiting = {"waiting": round(sum(waits) / len(waits), 4), "by_ten_steps": [round(wait, 3) for wait in waits]}
    return waiting | {"tokens_per_second": round(rate), "records": len(records)}


def read_cold(folder: Path) -> float:
    """Drop the files from the page cache; GB/s of reading the first of them then."""
    files = sorted(folder.rglob("part-*.parquet"))
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    return files[0].stat().st_size / 1e9 / (len(files[0].read_bytes()) and time.perf_counter() - started)


def main() -> None:
    """Parse the command line, measure, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--served", type=Path, required=True)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--tokens", type=float, default=12e6)
    parser.add_argument("--passes", type=float, default=2)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--from", dest="sources", nargs="+", default=["local", "s3"], choices=("local", "s3", "none"))
    parser.add_argument("--set", action="append", default=[], help="key=value of the settings")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = random_target(options.shape, device)
    no_end = cast(Any, SimpleNamespace(eos_token_id=0))
    target = replace(target, identity=replace(target.identity, weights="made up"), tokenizer=no_end)
    config = load_config("smollm2-gpu", [*SETTINGS, f"training.passes={options.passes}", *options.set])
    local = Store(options.folder / "local")
    started = time.perf_counter()
    features = make_features(local, options.shape, int(options.tokens), target)
    record: dict[str, Any] = {"tokens": features.summary["tokens"], "align_steps": config.training.align_steps}
    record["writing_seconds"] = round(time.perf_counter() - started, 1)
    if options.cold:
        record["disk_gb_per_second"] = round(read_cold(options.folder / "local"), 2)
    if "local" in options.sources:
        record["local"] = measured(config, features, local, target)
        print(json.dumps(record), flush=True)
    if "s3" in options.sources:
        options.served.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with served(local, options.served) as address:
            record["uploading_seconds"] = round(time.perf_counter() - started, 1)
            store = Store(address, cache=options.folder / "cache")
            record["s3"] = measured(config, features.model_copy(update={"root": store.root}), store, target)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(json.dumps(record | {"device": name, "cores": os.cpu_count(), **provenance()}))


if __name__ == "__main__":
    main()
