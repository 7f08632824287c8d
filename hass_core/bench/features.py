"""How fast features are written, read and computed on this machine. Run by `hass bench features`."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from hass_core.bench.feature_store import bench_store
from hass_core.bench.random_features import random_features
from hass_core.cli import main
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


def run(
    hidden_size: int,
    gigabytes: float,
    encoding: Encoding,
    folder: Path | None,
    target_source: str | None,
    store: str | None,
) -> None:
    """Measure the store at that address, else this machine's disk, and print the record."""
    if store:
        print(json.dumps(asdict(bench_store(store, hidden_size, gigabytes, encoding))))
        return
    target = load_target(TargetConfig(source=target_source)) if target_source else None
    print(json.dumps(asdict(bench_features(hidden_size, gigabytes, encoding, folder, target))))


if __name__ == "__main__":
    main(["bench", "features", *sys.argv[1:]])
