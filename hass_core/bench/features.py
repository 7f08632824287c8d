"""How fast features are written, read and computed on this machine. Run by `hass bench features`."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch

from hass_core.bench.feature_store import bench_store
from hass_core.bench.random_features import random_features
from hass_core.config import TargetConfig
from hass_core.features.reader import FeatureDataset
from hass_core.features.schema import Encoding
from hass_core.store import Store
from hass_core.target_model.capture import Capture
from hass_core.target_model.loader import Target, load_target

REPEATS = 3
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65_536}


@dataclass(frozen=True)
class FeaturesSpeed:
    """Rates in gigabytes and tokens a second; prefill and capture are None without a target."""

    rows: int
    gigabytes: float
    disk: str  # major:minor number of the block device, as /proc/self/mountinfo has it
    write_gb_per_second: float
    read_gb_per_second: float  # in order, every row checked, from the page cache
    read_again_gb_per_second: float  # in random order, rows checked before
    prefill_tokens_per_second: float | None = None
    capture_tokens_per_second: float | None = None


def bench_features(
    hidden_size: int = 4096,
    gigabytes: float = 1.0,
    encoding: Encoding = "bf16",
    folder: Path | None = None,
    target: Target | None = None,
) -> FeaturesSpeed:
    """Write and read `gigabytes` of random features under `folder` (default: a temporary one, removed afterwards)."""
    hidden_size = target.embedding.shape[1] if target else hidden_size
    with tempfile.TemporaryDirectory(prefix="hass-bench-", dir=folder) as place:
        store = Store(place)
        disk = f"{os.major(os.stat(place).st_dev)}:{os.minor(os.stat(place).st_dev)}"
        started = time.perf_counter()
        artifact, conversations, size = random_features(store, hidden_size, gigabytes, encoding)
        write = size / (time.perf_counter() - started)
        cached = FeatureDataset(store, artifact, cache_bytes=int(size * 2e9) + 1)
        seconds = _best(lambda: sum(1 for _ in FeatureDataset(store, artifact, cache_bytes=1).stream()))
        order = torch.randperm(len(cached)).tolist()
        for i in order:
            cached[i]
        again = _best(lambda: [cached[i] for i in order])
    prefill, capture = _target_speed(target) if target else (None, None)
    return FeaturesSpeed(conversations, size, disk, write, size / seconds, size / again, prefill, capture)


def _target_speed(target: Target, batches: int = 4, length: int = 256) -> tuple[float, float]:
    """Tokens a second of the bare forward pass, and of capturing as extraction does: brought to the CPU, one ahead."""
    length = min(length, target.context_tokens)
    tokens = TOKENS_PER_BATCH[target.device.type]
    ids = torch.randint(0, target.head.shape[0], (max(1, tokens // length), length))
    rows: list[list[int]] = ids.tolist()

    @torch.no_grad()
    def prefill() -> None:
        for _ in range(batches):
            cast(Any, target.model).base_model(input_ids=ids.to(target.device), use_cache=False)
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)

    def capture() -> None:
        waiting = Capture(target, rows)
        for _ in range(batches - 1):
            following = Capture(target, rows)
            waiting.rows()
            waiting = following
        waiting.rows()

    return batches * ids.numel() / _best(prefill), batches * ids.numel() / _best(capture)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def main() -> None:
    """Parse the command line, measure, print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--encoding", choices=get_args(Encoding), default="bf16")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary folder)")
    parser.add_argument("--target", default=None, help="measure extraction beside plain prefill with this target")
    parser.add_argument("--store", default=None, help="measure a store elsewhere instead: s3://BUCKET/FOLDER")
    options = vars(parser.parse_args())
    source, folder, url = (options.pop(name) for name in ("target", "folder", "store"))
    if url:
        print(json.dumps(asdict(bench_store(url, **options))))
        return
    target = load_target(TargetConfig(source=source)) if source else None
    print(json.dumps(asdict(bench_features(target=target, folder=folder, **options))))


if __name__ == "__main__":
    main()
