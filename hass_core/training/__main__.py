"""`accelerate launch -m hass_core.training RUN.toml [section.key=value …]`: train on as many processes as launched.

Earlier stages are taken from the store, and run first (by one process) where they are missing.
"""

import os
import sys

from accelerate import PartialState

from hass_core.config import RunConfig, load_config
from hass_core.stages import run_until
from hass_core.store import Store
from hass_core.target_model.loader import load_target
from hass_core.training.train import train_draft


def main(arguments: list[str]) -> None:
    """Train as the run file says, each process on its own device."""
    config = own_device(load_config(arguments[0], arguments[1:]))
    with PartialState().main_process_first():
        features = run_until("features", config)["features"]
    artifact = train_draft(config, features, Store(config.store), load_target(config.target))
    if int(os.environ.get("RANK", "0")) == 0:
        print(artifact.url)


def own_device(config: RunConfig) -> RunConfig:
    """`auto` becomes this process's GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if config.target.device != "auto" or rank is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return config
    target = config.target.model_copy(update={"device": f"cuda:{rank}"})
    return config.model_copy(update={"target": target})


if __name__ == "__main__":
    main(sys.argv[1:])
