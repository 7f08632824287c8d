"""Has traffic changed since the draft was trained? Two sets of conversations, compared by the letters people write.

Each conversation is the set of the three-letter pieces of its words, hashed; a side is the share that each piece has
of all. Their Jensen-Shannon divergence is 0 for equal sides and 1 bit for sides that share nothing. What chance alone
gives is found by dealing the same conversations to both sides again and again.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

BUCKETS = 4096
DEALS = 200
CHANCE = 0.99  # quantile of the deals
MOST = 2000  # conversations of a side


class Drift(BaseModel, frozen=True):
    """How far recent conversations are from those trained on, in bits; `by_chance` is seldom exceeded without cause."""

    distance: float
    by_chance: float
    conversations: int  # recent ones


def traffic_drift(trained: Sequence[str], recent: Sequence[str], seed: int = 0) -> Drift:
    """Compare texts; of more than 2000 a side, 2000 drawn by `seed`. Both sides need at least one."""
    random = np.random.default_rng(seed)
    sides = [_drawn(texts, random) for texts in (trained, recent)]
    pieces = np.stack([_pieces(text) for side in sides for text in side])
    first = len(sides[0])
    order = np.arange(len(pieces))
    deals = [_distance(pieces, random.permutation(order), first) for _ in range(DEALS)]
    return Drift(
        distance=_distance(pieces, order, first),
        by_chance=float(np.quantile(deals, CHANCE)),
        conversations=len(recent),
    )


def _drawn(texts: Sequence[str], random: np.random.Generator) -> list[str]:
    places: list[int] = random.permutation(len(texts))[:MOST].tolist()
    return [texts[place] for place in sorted(places)]


def _pieces(text: str) -> np.ndarray:
    """[BUCKETS], 1 where a piece occurs."""
    words = f" {' '.join(text.lower().split())} "
    found = np.zeros(BUCKETS, dtype=np.float32)
    for start in range(len(words) - 2):
        found[zlib.crc32(words[start : start + 3].encode(errors="surrogatepass")) % BUCKETS] = 1
    return found


def _distance(pieces: np.ndarray, order: np.ndarray, first: int) -> float:
    """Jensen-Shannon divergence in bits of the first so many conversations, in this order, from the others."""
    chosen = np.zeros(len(pieces), dtype=np.float32)
    chosen[order[:first]] = 1
    p, q = chosen @ pieces, (1 - chosen) @ pieces
    p, q = p / max(p.sum(), 1), q / max(q.sum(), 1)
    middle = (p + q) / 2
    return float((_relative(p, middle) + _relative(q, middle)) / 2)


def _relative(p: np.ndarray, middle: np.ndarray) -> float:
    some = p > 0
    return float((p[some] * np.log2(p[some] / middle[some])).sum())
