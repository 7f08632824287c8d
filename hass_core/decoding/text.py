"""From tokens to the text a client may see: whole characters, nothing of a stop string or of an end token."""

from collections.abc import Callable, Sequence

from hass_core.decoding.answers import Finished

CUT = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


class AnswerText:
    """One answer while it grows. `decode` turns token ids into text without special tokens."""

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()):
        self._decode, self._stops = decode, tuple(stop_strings)
        self._token_ids: list[int] = []
        self.shown = ""

    def add(self, token_ids: Sequence[int], finished: Finished | None) -> str:
        """The text that has become visible with these tokens."""
        self._token_ids += token_ids
        text = self._decode(self._token_ids)
        text = self._cut_at_stop(text) if finished else self._certain(text)
        new = text[len(self.shown) :]
        self.shown += new
        return new

    def _cut_at_stop(self, text: str) -> str:
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        return text[: min(starts, default=len(text))]

    def _certain(self, text: str) -> str:
        """Without half a character at the end, and without what may turn out to begin a stop string."""
        text = text.rstrip(CUT)
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
