"""How fast features come from a store elsewhere, beside what its link gives: `hass bench features --store URL`."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from hass_core.bench.random_features import random_features
from hass_core.errors import BadInput
from hass_core.features.reader import OPENING_THREADS, FeatureDataset
from hass_core.features.remote import open_remote
from hass_core.features.schema import Encoding
from hass_core.store import Store

PIECE = 8 << 20


@dataclass(frozen=True)
class StoreSpeed:
    """Rates in gigabytes a second."""

    rows: int
    gigabytes: float
    write_gb_per_second: float
    link_gb_per_second: float  # the files' bytes alone, by the same client, in pieces by several threads
    read_gb_per_second: float  # in order, every row checked, nothing kept here before
    read_again_gb_per_second: float  # the same from the copies that are kept on disk


def bench_store(url: str, hidden_size: int = 4096, gigabytes: float = 1.0, encoding: Encoding = "bf16") -> StoreSpeed:
    """Write random features into a folder of its own below `url`, read them, and remove them. Raises StoreError."""
    root = f"{url.rstrip('/')}/hass-bench-{uuid4().hex[:12]}"
    with tempfile.TemporaryDirectory(prefix="hass-bench-") as cache:
        store = Store(root, cache=Path(cache), cache_gb=2 * gigabytes + 1)
        if store.is_local:
            raise BadInput(f"{url} is on this machine's disk; --folder says where to write there")
        store.check_writable()  # else the first word would be of what cannot be removed
        try:
            started = time.perf_counter()
            artifact, rows, size = random_features(store, hidden_size, gigabytes, encoding)
            write = time.perf_counter() - started
            names = [name for name in store.open(artifact).finished() if name.endswith(".parquet")]
            urls = [f"{store.root}/features/{artifact.digest}/{name}" for name in names]
            started = time.perf_counter()
            fetched = sum(_fetched(store, file) for file in urls)
            link = time.perf_counter() - started
            read, again = (_seconds(FeatureDataset(store, artifact, cache_bytes=1)) for _ in range(2))
        finally:
            with store.named_failures("remove from"):
                store.fs.invalidate_cache()
                store.fs.rm(root.split("://", 1)[1], recursive=True)
    return StoreSpeed(rows, size, size / write, fetched / 1e9 / link, size / read, size / again)


def _fetched(store: Store, url: str) -> int:
    """Bytes of a file, each read once."""
    file = open_remote(store, url)
    size = file.size()
    with ThreadPoolExecutor(OPENING_THREADS) as threads:
        pieces = threads.map(lambda at: len(file.read_at(min(PIECE, size - at), at)), range(0, size, PIECE))
        return sum(pieces)


def _seconds(dataset: FeatureDataset) -> float:
    started = time.perf_counter()
    for _ in dataset.stream():
        pass
    seconds = time.perf_counter() - started
    dataset.close()
    return seconds
