"""Which conversations train together: packs of about `tokens_per_pack` tokens, drawn anew for each pass.

The order is a pure function of the lengths, the seed and the pass, so training resumes anywhere by counting packs:
there is no state to save. Each pass holds every conversation exactly once.
"""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

BLOCK, SAMPLED = 64, 8  # conversations; those of a block that a sample takes
WINDOW = 4096  # conversations packed together: large enough to fill packs, small enough to read from few files


def packs_of_pass(lengths: Sequence[int] | np.ndarray, tokens_per_pack: int, seed: int, number: int) -> list[list[int]]:
    """All conversations, as packs in random order. A conversation longer than a pack gets one to itself."""
    generator = np.random.default_rng((seed, number))
    blocks = blocks_of(len(lengths))
    order = np.concatenate([blocks[i] for i in generator.permutation(len(blocks))])
    packs: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = generator.permutation(order[start : start + WINDOW])
        filled = best_fit(window, np.asarray(lengths)[window], tokens_per_pack)
        packs += [filled[i] for i in generator.permutation(len(filled))]
    return packs


def blocks_of(count: int) -> list[np.ndarray]:
    """Conversations 0 to `count` in blocks of neighbours, which stand in one file and mostly in one row group."""
    return np.array_split(np.arange(count), max(1, count // BLOCK))


def sample_order(count: int, seed: int) -> list[int]:
    """All of `count` conversations, so that the first ones are a random sample read from few row groups."""
    generator = np.random.default_rng(seed)
    blocks = [generator.permutation(block) for block in blocks_of(count)]
    mixed = [blocks[i] for i in generator.permutation(len(blocks))]
    first, rest = ([part for block in mixed for part in block[own]] for own in (slice(SAMPLED), slice(SAMPLED, None)))
    return [int(i) for i in first + rest]


def best_fit(indices: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, longest first, goes into the fullest pack it fits in."""
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for i in np.argsort(-lengths, kind="stable"):
        place = bisect.bisect_left(free, (int(lengths[i]), -1))
        room, pack = free.pop(place) if place < len(free) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(int(indices[i]))
        if room > lengths[i]:
            bisect.insort(free, (room - int(lengths[i]), pack))
    return packs


class PackStream:
    """The endless sequence of packs of all passes, readable from any place."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, tokens_per_pack: int, seed: int):
        self.lengths, self.tokens_per_pack, self.seed = np.asarray(lengths), tokens_per_pack, seed

    def passes(self, start: int = 0) -> Iterator[list[int]]:
        """Packs from number `start` on, counted from the first pass."""
        number = 0
        while True:
            packs = packs_of_pass(self.lengths, self.tokens_per_pack, self.seed, number)
            yield from packs[start:]
            start, number = max(0, start - len(packs)), number + 1

    def packs_in(self, passes: float) -> int:
        """Packs of so many passes; a part of a pass counts in proportion, rounded up."""
        total, number = 0, 0
        while passes > 0:
            count = len(packs_of_pass(self.lengths, self.tokens_per_pack, self.seed, number))
            total += int(np.ceil(count * min(1.0, passes)))
            passes, number = passes - 1, number + 1
        return total
