"""What a decoder is asked and what it gives: the stop rule, a streamed step, a whole answer, a trace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hass_core.target_model.loader import Target

Finished = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class StopRule:
    """Tokens and strings that end an answer. `decode` turns token ids into text; needed with stop strings only."""

    eos_token_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] = lambda token_ids: ""

    @classmethod
    def of(cls, target: Target, strings: Sequence[str] = (), ignore_eos: bool = False) -> "StopRule":
        """The target's own end tokens, and `strings`."""
        eos = frozenset() if ignore_eos else frozenset(target.eos_token_ids)
        return cls(eos, tuple(strings), lambda token_ids: str(target.tokenizer.decode(token_ids)))


@dataclass(frozen=True)
class CycleTrace:
    """One verification of one row.

    `ranks` are the accepted nodes' ranks among their siblings; `offered` the number of children of each node reached,
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
