"""What a decoder is asked and what it gives: the stop rule, answers in the making, a streamed step, a trace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hass_core.decoding.tree import RowReport
from hass_core.errors import BadInput, ContextTooLong, NonFinite
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


class Answer:
    """The tokens of one answer so far. `finished` tells why it ended, None while it has not."""

    def __init__(self, rule: StopRule, max_new_tokens: int):
        self._rule, self._max = rule, max_new_tokens
        self.token_ids: list[int] = []
        self.finished: Finished | None = None
        # a stop string is found in the text of the last tokens; no token is shorter than a quarter of a character
        self._tail = 4 * max(map(len, rule.strings), default=0) + 8

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Append tokens up to and including the one that ends the answer; returns those taken."""
        taken: list[int] = []
        for token_id in token_ids if self.finished is None else ():
            self.token_ids.append(token_id)
            taken.append(token_id)
            self.finished = self._reason(token_id)
            if self.finished:
                break
        return taken

    def _reason(self, token_id: int) -> Finished | None:
        if token_id in self._rule.eos_token_ids:
            return "eos"
        if self._rule.strings:
            text = self._rule.decode(self.token_ids[-self._tail :])
            if any(string in text for string in self._rule.strings):
                return "stop"
        return "length" if len(self.token_ids) >= self._max else None


class Answers:
    """The prompts of one call while they are answered. An answer may be shorter than asked for where the context ends.

    Raises as `check_prompts`.
    """

    def __init__(self, prompts: list[list[int]], max_new_tokens: int, stop: StopRule, context_tokens: int):
        check_prompts(prompts, context_tokens)
        limits = [min(max_new_tokens, context_tokens - len(prompt)) for prompt in prompts]
        self.rows = [Answer(stop, limit) for limit in limits]
        self.traces: list[list[CycleTrace]] = [[] for _ in prompts]
        self.max_tokens = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))

    @property
    def open_rows(self) -> list[bool]:
        """Which answers have not ended."""
        return [answer.finished is None for answer in self.rows]

    def take(self, reports: list[RowReport], drafted_depth: int, first: bool = False) -> list[int]:
        """Hand each open answer its new tokens; returns how many it took. Raises NonFinite."""
        taken = []
        for row, (answer, report) in enumerate(zip(self.rows, reports, strict=True)):
            if answer.finished is None:
                check_sound(report.sound, row, len(answer.token_ids))
                if not first:
                    accepted = len(report.token_ids) - 1
                    self.traces[row].append(CycleTrace(accepted, drafted_depth, report.ranks, report.offered))
            taken.append(len(answer.take(report.token_ids)))
        return taken

    def generations(self, timings: list[Timing]) -> list[Generation]:
        """The answers so far; the first timing is the prefill with the first token."""
        return [
            Generation(
                token_ids=answer.token_ids,
                finished=answer.finished or "length",
                cycles=traces,
                timings=timings[1:],
                prefill_seconds=timings[0].total_seconds,
                decode_seconds=sum(timing.total_seconds for timing in timings[1:]),
            )
            for answer, traces in zip(self.rows, self.traces, strict=True)
        ]


def check_prompts(prompts: list[list[int]], context_tokens: int) -> None:
    """Raise BadInput for an empty prompt, ContextTooLong for one that leaves no room for an answer."""
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise BadInput(f"prompt {row} has no tokens; give at least one")
        if len(prompt) >= context_tokens:
            raise ContextTooLong(
                f"prompt {row} has {len(prompt)} tokens, the target's context holds {context_tokens} with the answer; "
                "shorten the prompt or choose a target with a longer context"
            )


def check_sound(sound: bool, row: int, position: int) -> None:
    """Raise NonFinite unless the logits after `position` new tokens were sound."""
    if not sound:
        raise NonFinite(
            f"the target's logits for prompt {row} are NaN or infinite after {position} new tokens; "
            "load the target in float32 or bfloat16, and check its weights"
        )
