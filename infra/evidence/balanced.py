"""A target spread over several GPUs (`target.device=balanced`) beside the same on one: features of the same answers.

    PYTHONPATH=. python infra/evidence/balanced.py [--preset llama-3.1-8b] [--layers 16]

Random weights of the preset's width. Prints one JSON object: for both the memory on each GPU and tokens per second of
the features stage's pass, and the largest difference of two features, relative to their size.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from hass_core.config import RunConfig, load_config
from hass_core.features.extract import extract_features
from hass_core.features.reader import FeatureDataset
from hass_core.stages import run_until
from hass_core.store import Store
from hass_core.store.provenance import provenance
from hass_core.target_model.loader import load_target
from infra.evidence.wide_presets import wide_target
from tests.forecast.test_presets_run import small_run

DEVICES = {"one": "cuda:0", "balanced": "balanced"}


def on(run: RunConfig, device: str, store: Path) -> RunConfig:
    placed = run.target.model_copy(update={"device": device, "dtype": "bfloat16"})
    return run.model_copy(update={"target": placed, "store": str(store)})


def features_of(run: RunConfig) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """By conversation [L, H]; and the figures."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    store, target = Store(run.store), load_target(run.target)
    held = [round(torch.cuda.memory_allocated(device) / 2**30, 2) for device in range(torch.cuda.device_count())]
    answers = run_until("responses", run)["responses"]  # finished: read from the store
    made = extract_features(run, answers, store, target)
    dataset = FeatureDataset(store, made)
    rows = {row.id: row.features for row in dataset.many(range(len(dataset)))}
    return rows, {"weights_gib": held, **{name: made.summary[name] for name in ("tokens", "tokens_per_second")}}


def main() -> None:
    """Parse the command line, measure, print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    found, record = {}, {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wide_target(load_config(options.preset).target.source, folder / "target", "cuda:0", options.layers)
        torch.cuda.empty_cache()
        run = small_run(options.preset, folder)
        long = run.responses.model_copy(update={"max_new_tokens": 512})  # random weights seldom end an answer
        run = run.model_copy(update={"responses": long})
        run_until("responses", on(run, DEVICES["one"], folder / "one"))
        shutil.copytree(folder / "one", folder / "balanced")
        for name, device in DEVICES.items():
            found[name], record[name] = features_of(on(run, device, folder / name))
            torch.cuda.empty_cache()
    pairs = [(found["balanced"][name], rows) for name, rows in found["one"].items()]
    gaps = [(theirs - rows).float().norm() / rows.float().norm() for theirs, rows in pairs]
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    print(json.dumps({**record, "largest_difference": float(max(gaps)), "device": device, **provenance()}))


if __name__ == "__main__":
    main()
