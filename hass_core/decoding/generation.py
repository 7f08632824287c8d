"""What every decoder takes and gives: the interface, a streamed step, a finished generation with its trace."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from hass_core.config import SamplingConfig
from hass_core.decoding.stop import Finished, StopRule


@dataclass(frozen=True)
class CycleTrace:
    """One verification of one row.

    `ranks` are the accepted nodes' places among their siblings; `offered` the number of children of each node reached,
    the last one included. A rank r was tried at depth d exactly where offered[d] > r.
    """

    accepted: int
    drafted_depth: int
    ranks: tuple[int, ...] = ()
    offered: tuple[int, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one cycle. Draft and verify are measured on the CPU only, where nothing runs ahead."""

    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """What one cycle adds to one streamed answer."""

    token_ids: list[int]
    trace: CycleTrace
    timing: Timing
    finished: Finished | None = None


@dataclass
class Generation:
    """One answer. `token_ids` ends with the end token when `finished` is "eos"; the prompt is not in it."""

    token_ids: list[int] = field(default_factory=list)
    finished: Finished = "length"
    cycles: list[CycleTrace] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Decoder(Protocol):
    """A way of decoding. Same target, sampling and seed: the same tokens, whichever decoder."""

    name: str

    def stream(
        self, prompt_token_ids: list[int], sampling: SamplingConfig, max_new_tokens: int, stop: StopRule
    ) -> Iterator[Step]:
        """Answer one prompt, a step per cycle. The first step holds the token drawn after the prompt.

        Raises ContextTooLong when the prompt leaves no room, NonFinite when the target's logits are not numbers.
        """
        ...

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: StopRule,
        seed: int | None = None,
    ) -> list[Generation]:
        """Answer all prompts as one batch. `seed` replaces `sampling.seed`; prompt i draws with its own coins."""
        ...
