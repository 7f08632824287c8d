"""`accelerate launch -m hass_core.training RUN.toml [section.key=value …]`: train on as many processes as launched.

Earlier stages are taken from the store, and run first (by one process) where they are missing. With
`--features STORE/features/DIGEST` these are trained on, and of the target only embedding and head are read.
"""

import argparse
import json
import os
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path

from accelerate import PartialState

from hass_core.config import RunConfig, load_config, parse_config
from hass_core.errors import USER_ERROR, HassError
from hass_core.features.extract import MADE_WITH
from hass_core.progress import no_progress
from hass_core.stages import run_until
from hass_core.store import Artifact, Store, store_at
from hass_core.target_model.embeddings import MadeWith, load_embeddings
from hass_core.target_model.known import KnownTarget
from hass_core.target_model.loader import load_target
from hass_core.training.launch import report_problem, report_progress, stop_with_parent
from hass_core.training.train import train_draft


def main(arguments: list[str]) -> None:
    """Train as the run file says, each process on its own device."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m hass_core.training")
    parser.add_argument("run", help="preset, .toml file, or .json file of whole settings")
    parser.add_argument("changes", nargs="*", metavar="section.key=value")
    parser.add_argument("--features", metavar="STORE/features/DIGEST", help="train on these")
    parser.add_argument("--reports", type=Path, help="a folder for progress and mistakes (launch.py)")
    options = parser.parse_args(arguments)
    if options.reports:
        stop_with_parent()
    try:
        train(options)
    except HassError as problem:
        if options.reports is None:
            raise
        report_problem(options.reports, problem)
        sys.exit(USER_ERROR)


def train(options: argparse.Namespace) -> None:
    """See `main`."""
    config = own_device(_settings(options), but=() if options.features else ("balanced",))
    first = int(os.environ.get("RANK", "0")) == 0
    if options.features:
        store, features = store_at(options.features, "features")
    else:
        store = Store(config.store)
        with PartialState().main_process_first():
            features = run_until("features", config)["features"]
    progress = partial(report_progress, options.reports) if options.reports and first else no_progress
    artifact = train_draft(config, features, store, target_for(config, store, features), progress)
    if first:
        print(artifact.url)


def _settings(options: argparse.Namespace) -> RunConfig:
    if options.run.endswith(".json"):
        return parse_config(json.loads(Path(options.run).read_text()), options.changes, where=options.run)
    return load_config(options.run, options.changes)


def target_for(config: RunConfig, store: Store, features: Artifact) -> KnownTarget:
    """As much of the target as training on these features takes: all of it where they are made while training, or do
    not say which target made them."""
    folder = store.open(features)
    manifest = folder.manifest()
    if config.features.encoding == "none" or manifest is None or MADE_WITH not in manifest.files:
        return load_target(config.target)
    return load_embeddings(config.target, MadeWith.model_validate_json(folder.read_text(MADE_WITH)))


def own_device(config: RunConfig, but: Collection[str] = ()) -> RunConfig:
    """A device that leaves a choice, `but` those named, becomes this process's GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if config.target.device not in {"auto", "balanced"}.difference(but) or rank is None:
        return config
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return config
    target = config.target.model_copy(update={"device": f"cuda:{rank}"})
    return config.model_copy(update={"target": target})


if __name__ == "__main__":
    main(sys.argv[1:])
