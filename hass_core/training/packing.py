"""Which conversations train together: packs of about `tokens_per_pack` tokens, drawn anew for each pass.

The order is a pure function of the lengths, the row groups, the seed and the pass, so training resumes anywhere by
counting packs: there is no state to save. Each pass holds every conversation exactly once.

A row group is read whole. So a pass goes through windows of a few row groups drawn at random, and everything of a
window is shuffled: whatever the data's size, what is read is used before it is forgotten.
"""

import bisect
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

BLOCK = 64  # conversations taken as a row group where nobody says what those are
SAMPLED = 8  # conversations of a row group that a sample takes
WINDOW_BLOCKS = 16  # row groups, of 64 MB, that are shuffled together
WINDOW = 4096  # conversations at most, or packing them takes long


def packs_of_pass(
    lengths: Sequence[int] | np.ndarray,
    tokens_per_pack: int,
    seed: int,
    number: int,
    blocks: Sequence[int] | np.ndarray | None = None,
) -> list[list[int]]:
    """All conversations, as packs in random order. A conversation longer than a pack gets one to itself.

    `blocks`: the first conversation of each row group, ascending.
    """
    return list(_packs_by_window(np.asarray(lengths), tokens_per_pack, seed, number, blocks))


def _packs_by_window(
    lengths: np.ndarray, tokens_per_pack: int, seed: int, number: int, blocks: Sequence[int] | np.ndarray | None
) -> Iterator[list[int]]:
    """As `packs_of_pass`, each window packed when it is reached: a whole pass would hold a training step up."""
    generator = np.random.default_rng((seed, number))
    parts = divided(len(lengths), blocks)
    drawn = [parts[i] for i in generator.permutation(len(parts))]
    for window in _windows(drawn):
        shuffled = generator.permutation(window)
        filled = best_fit(shuffled, lengths[shuffled], tokens_per_pack)
        yield from (filled[i] for i in generator.permutation(len(filled)))


def _windows(blocks: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Blocks after one another, so many at a time that they can be shuffled together."""
    window: list[np.ndarray] = []
    for block in blocks:
        full = len(window) == WINDOW_BLOCKS or sum(map(len, window)) + len(block) > WINDOW
        if window and full:
            yield np.concatenate(window)
            window = []
        window.append(block)
    if window:
        yield np.concatenate(window)


def divided(count: int, blocks: Sequence[int] | np.ndarray | None = None) -> list[np.ndarray]:
    """Conversations 0 to `count` by row group."""
    if blocks is None:
        return np.array_split(np.arange(count), max(1, count // BLOCK))
    return np.split(np.arange(count), np.asarray(blocks)[1:])


def sample_order(count: int, seed: int, blocks: Sequence[int] | np.ndarray | None = None) -> list[int]:
    """All of `count` conversations, so that the first ones are a random sample read from few row groups."""
    generator = np.random.default_rng(seed)
    parts = [generator.permutation(part) for part in divided(count, blocks)]
    shuffled = [parts[i] for i in generator.permutation(len(parts))]
    first, rest = ([i for part in shuffled for i in part[own]] for own in (slice(SAMPLED), slice(SAMPLED, None)))
    return [int(i) for i in first + rest]


def best_fit(indices: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, longest first, goes into the fullest pack it fits in."""
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for i in np.argsort(-lengths, kind="stable"):
        fitting = bisect.bisect_left(free, (int(lengths[i]), -1))
        room, pack = free.pop(fitting) if fitting < len(free) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(int(indices[i]))
        if room > lengths[i]:
            bisect.insort(free, (room - int(lengths[i]), pack))
    return packs


class PackStream:
    """The endless sequence of packs of all passes, readable from any of them on."""

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        tokens_per_pack: int,
        seed: int,
        blocks: Sequence[int] | np.ndarray | None = None,
    ):
        self.lengths, self.tokens_per_pack, self.seed, self.blocks = np.asarray(lengths), tokens_per_pack, seed, blocks

    def passes(self, start: int = 0) -> Iterator[list[int]]:
        """Packs from number `start` on, counted from the first pass."""
        for number in count():
            for pack in self._packs(number):
                if start:
                    start -= 1
                else:
                    yield pack

    def packs_in(self, passes: float) -> int:
        """Packs of so many passes; a part of a pass counts in proportion, rounded up."""
        total, number = 0, 0
        while passes > 0:
            packs = sum(1 for _ in self._packs(number))
            total += int(np.ceil(packs * min(1.0, passes)))
            passes, number = passes - 1, number + 1
        return total

    @property
    def window(self) -> int:
        """Conversations of a window, about."""
        blocks = len(divided(len(self.lengths), self.blocks))
        return min(WINDOW, WINDOW_BLOCKS * len(self.lengths) // max(1, blocks))

    def _packs(self, number: int) -> Iterator[list[int]]:
        return _packs_by_window(self.lengths, self.tokens_per_pack, self.seed, number, self.blocks)
