"""Whether this machine has what a run needs: access to the target, memory for it, disk for its features."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hass_core.config import RunConfig
from hass_core.errors import BadInput, StoreError, TargetError
from hass_core.forecast import cost
from hass_core.forecast.forecast import forecast
from hass_core.forecast.rows import counted, not_counted
from hass_core.forecast.shape import shape_of
from hass_core.presets import recorded_shapes
from hass_core.target_model.hub import hub_file
from hass_core.target_model.source import lacking
from hass_core.units import size_words, time_words


def check_ready(config: RunConfig) -> None:
    """Refuse a run that this machine cannot finish: the first thing that it lacks, before anything is fetched.

    Raises TargetError for access, for what the target's folder lacks, and for memory, StoreError for disk. A target
    whose sizes are not known is let through.
    """
    check_access(config.target.source)
    if lack := lacking(config.target.source):
        raise TargetError(lack)
    try:
        shape = shape_of(config.target.source).drafted_by(config.draft)
    except BadInput:
        return
    gpus = [] if config.target.device == "cpu" else [gpu.memory for gpu in present_gpus()]
    check_memory(config, shape.weight_bytes, cost.memory(config, shape)["training"], gpus)
    if "://" not in config.store:
        check_disk(Path(config.store), cost.disk(config, shape, cost.work_of(config)), config)


def check_access(source: str) -> None:
    """Raise TargetError for a gated target that is not on this machine while there is no token to fetch it with."""
    gated = recorded_shapes().get(source, {}).get("gated", False)
    if not gated or hub_file(source, "config.json"):
        return
    from huggingface_hub import get_token

    if not get_token():
        raise TargetError(
            f"the target {source} is gated: accept its terms on https://huggingface.co/{source} and set HF_TOKEN to a "
            "token of that account"
        )


def check_memory(config: RunConfig, weights: float, training: float, gpus: Sequence[float]) -> None:
    """Raise TargetError where neither `gpus` (bytes of each) nor, without one, this machine's memory hold `weights`
    bytes, or one GPU not the training."""
    if not gpus:
        held = _host_memory()
        if weights > held:
            raise TargetError(
                f"the target {config.target.source} has {size_words(weights)} of weights, this machine "
                f"{size_words(held)} of memory and no GPU; choose a smaller target or another machine"
            )
        return
    spread = config.target.device == "balanced"
    held = sum(gpus) if spread else gpus[0]
    if weights > cost.SHARE_OF_MEMORY * held:
        advice = "more GPUs" if spread else 'target.device = "balanced" on several GPUs, with a server for the answers'
        raise TargetError(
            f"the target {config.target.source} has {size_words(weights)} of weights, "
            f"{'these GPUs' if spread else 'this GPU'} {size_words(held)} of memory; it takes {advice}"
        )
    if training > gpus[0]:
        raise TargetError(
            f"training takes {size_words(training)} of GPU memory, this GPU has {size_words(gpus[0])}; lower "
            "training.packs_per_micro_batch or training.tokens_per_pack, or set training.recompute"
        )


def check_disk(store: Path, needed: float, config: RunConfig) -> None:
    """Raise StoreError where the disk has no room for `needed` bytes beside the features that the store holds already,
    which may be this run's."""
    stored = sum(file.stat().st_size for file in (store / "features").rglob("*.parquet"))
    existing = next(folder for folder in (store, *store.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free + stored:
        raise StoreError(
            f"{config.name} will write about {size_words(needed)} into {store}, where {size_words(free)} are free; "
            'make room, give another store, or set features.encoding = "int8" (half) or "none"'
        )


@dataclass(frozen=True)
class Present:
    """A GPU of this machine; `kind` as in cost.GPUS, None for another."""

    kind: str | None
    memory: float


def present_gpus() -> list[Present]:
    """The GPUs that NVIDIA's driver tells of; [] without one."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    found = (line.split(",", 1) for line in told.splitlines() if "," in line)
    return [Present(_kind(name), float(size) * 2**20) for size, name in found if size.strip().isdigit()]


def _kind(name: str) -> str | None:
    return next((kind for kind in cost.GPUS if kind in name.lower()), None)


def announcement(config: RunConfig) -> list[str]:
    """What a run on this machine will cost, in a few lines."""
    gpus = present_gpus()
    here = [f"{gpus[0].kind}x{len(gpus)}"] if gpus and gpus[0].kind else []
    try:
        found = forecast(config, here, counted(config.prompts.files))
    except BadInput as error:
        return [f"no forecast: {error}"]
    took = [f"about {time_words(3600 * row.total)} on {row.gpus}" for row in found.hours if row.total is not None]
    return [*found.lines(), *(took or time_without_gpu(config, gpus)), *not_counted(config.prompts, None)]


def time_without_gpu(config: RunConfig, gpus: Sequence[Present]) -> list[str]:
    """How long a run takes on a machine that has none of `gpus`, or that this is not known; nothing where it has some.

    Raises BadInput where the target's sizes are not known.
    """
    if gpus and config.target.device != "cpu":
        return []
    shape = shape_of(config.target.source).drafted_by(config.draft)
    seconds = cost.cpu_seconds(config, shape, cost.work_of(config, counted(config.prompts.files)))
    if seconds is not None:
        return [f"about {time_words(seconds)} on {cost.CPU}; this machine's were not measured"]
    return [f"no time is forecast: without a GPU only {cost.CPU_TARGET} was measured, on {cost.CPU}"]


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
