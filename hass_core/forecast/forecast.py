"""The forecast of one run, as `hass forecast` shows it."""

import re
from collections.abc import Iterable, Sequence
from typing import get_args

from pydantic import BaseModel

from hass_core.config import RunConfig, Stage
from hass_core.errors import ConfigError
from hass_core.features.sizes import Encoding
from hass_core.forecast import cost
from hass_core.forecast.checked import Check, checks
from hass_core.forecast.shape import Shape, shape_of
from hass_core.units import size_words

DEFAULT_GPUS = tuple(f"{kind}x{count}" for kind in ("h100", "a100", "4090") for count in (1, 2, 8))


class Hours(BaseModel):
    """On GPUs of one kind: of the stages that fit into their memory, and in all where all do."""

    gpus: str
    stages: dict[Stage, float]
    total: float | None


class Forecast(BaseModel):
    """What a run needs. Bytes of memory are a GPU's; of disk the store's."""

    preset: str
    target: str
    target_parameters: int
    draft_parameters: int
    conversations: int
    answer_tokens: int
    trained_tokens: int
    memory_bytes: dict[str, float]
    feature_bytes: dict[Encoding, float]
    disk_bytes: float
    encoding: Encoding
    hours: list[Hours]
    rates: list[cost.Rate]
    checks: list[Check]
    assumed: tuple[str, ...]

    def lines(self) -> Iterable[str]:
        """Sizes, amounts, memory and disk in words."""
        yield f"{self.preset}: {self.target}, {_count(self.target_parameters)} parameters"
        yield f"draft: {_count(self.draft_parameters)} trained parameters, beside the target's embedding and head"
        yield (
            f"{self.conversations:,} conversations, {_count(self.answer_tokens)} answer tokens, "
            f"{_count(self.trained_tokens)} tokens trained on"
        )
        memory = ", ".join(f"{stage} {size_words(size)}" for stage, size in self.memory_bytes.items())
        yield f"GPU memory: {memory}"
        sizes = ", ".join(f"{name} {size_words(size)}" for name, size in self.feature_bytes.items())
        yield f"disk: features as {sizes}; {self.encoding} and checkpoints {size_words(self.disk_bytes)}"

    def checked(self) -> str:
        """How far such forecasts were off."""
        of_rates = [c.error for c in self.checks if c.unit == "tokens/s"]
        of_memory = [c.error for c in self.checks if c.unit == "GiB"]
        of_stages = [c.error for c in self.checks if c.unit == "s"]
        return (
            f"checked on H100s and H200s at the sizes of SmolLM2-135M, an 8B and a 70B target: training's rate "
            f"{_span(of_rates)}, its memory {_span(of_memory)}; stages of a whole run, SmolLM2 only, "
            f"{_span(of_stages)}. Nothing of a larger target was run whole, nor anything on other GPUs (--rates says "
            "more)"
        )


def forecast(config: RunConfig, gpus: Sequence[str] = DEFAULT_GPUS, conversations: int | None = None) -> Forecast:
    """What a run of these settings costs on each of `gpus` (`h100x8`).

    Raises BadInput where the target's sizes are not known here, ConfigError for GPUs that are not.
    """
    shape, work = shape_of(config.target.source).drafted_by(config.draft), cost.work_of(config, conversations)
    trained = config.training.passes * work.tokens * (1 - config.features.validation_fraction)
    return Forecast(
        preset=config.name,
        target=config.target.source,
        target_parameters=shape.target,
        draft_parameters=shape.draft,
        conversations=work.conversations,
        answer_tokens=work.answer_tokens,
        trained_tokens=round(trained),
        memory_bytes=cost.memory(config, shape),
        feature_bytes={name: cost.feature_bytes(shape, work, name) for name in get_args(Encoding)},
        disk_bytes=cost.disk(config, shape, work),
        encoding=config.features.encoding,
        hours=[_hours(config, shape, work, name) for name in gpus],
        rates=cost.MEASURED,
        checks=checks(),
        assumed=cost.ASSUMED,
    )


def _hours(config: RunConfig, shape: Shape, work: cost.Work, name: str) -> Hours:
    gpu, count = parse_gpus(name)
    seconds = cost.stage_seconds(config, shape, work, gpu, count)
    stages: dict[Stage, float] = {stage: time / 3600 for stage, time in seconds.items()}
    total = sum(stages.values()) if len(stages) == len(get_args(Stage)) else None
    return Hours(gpus=f"{count} × {gpu.title}", stages=stages, total=total)


def parse_gpus(name: str) -> tuple[cost.Gpu, int]:
    """`h100x8` → eight H100s. Raises ConfigError."""
    found = re.fullmatch(r"([a-z0-9]+?)(?:x([1-9]\d{0,3}))?", name.lower())
    if not found or found[1] not in cost.GPUS:
        raise ConfigError(f"no rates for GPUs {name!r}; give one of {', '.join(cost.GPUS)}, with a number as in h100x8")
    return cost.GPUS[found[1]], int(found[2] or 1)


def _count(number: float) -> str:
    if number < 1e5:
        return f"{number:,.0f}"
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _span(errors: Sequence[float]) -> str:
    return f"{min(errors):+.0%} to {max(errors):+.0%}"
