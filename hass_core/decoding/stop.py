"""When an answer ends: end tokens, stop strings, and the number of tokens asked for.

A speculative cycle emits several tokens at once; the cut is made at the exact token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
