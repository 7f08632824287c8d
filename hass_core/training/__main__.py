"""`accelerate launch -m hass_core.training RUN.toml [section.key=value …]`: train on as many processes as launched.

Earlier stages are taken from the store, and run first (by one process) where they are missing. With
`--features STORE/features/DIGEST` these are trained on, and of the target only embedding and head are read.
"""

import argparse
import os
import sys
from collections.abc import Collection

from accelerate import PartialState

from hass_core.config import RunConfig, load_config
from hass_core.features.extract import WHOSE
from hass_core.stages import run_until
from hass_core.store import Artifact, Store, store_at
from hass_core.target_model.ends import Whose, load_ends
from hass_core.target_model.known import KnownTarget
from hass_core.target_model.loader import load_target
from hass_core.training.train import train_draft


def main(arguments: list[str]) -> None:
    """Train as the run file says, each process on its own device."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m hass_core.training")
    parser.add_argument("run", help="preset or .toml file")
    parser.add_argument("changes", nargs="*", metavar="section.key=value")
    parser.add_argument("--features", metavar="STORE/features/DIGEST", help="train on these")
    options = parser.parse_args(arguments)
    config = load_config(options.run, options.changes)
    config = own_device(config, but=() if options.features else ("balanced",))
    if options.features:
        store, features = store_at(options.features, "features")
    else:
        store = Store(config.store)
        with PartialState().main_process_first():
            features = run_until("features", config)["features"]
    artifact = train_draft(config, features, store, target_for(config, store, features))
    if int(os.environ.get("RANK", "0")) == 0:
        print(artifact.url)


def target_for(config: RunConfig, store: Store, features: Artifact) -> KnownTarget:
    """As much of the target as training on these features takes: all of it where they are made while training, or do
    not tell whose they are."""
    folder = store.open(features)
    manifest = folder.manifest()
    if config.features.encoding == "none" or manifest is None or WHOSE not in manifest.files:
        return load_target(config.target)
    return load_ends(config.target, Whose.model_validate_json(folder.read_text(WHOSE)))


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
