"""Near-duplicate texts by MinHash with locality-sensitive hashing.

A text becomes the set of its 5-byte pieces. MinHash keeps, for each of 128 random orderings, the smallest piece:
two sets agree in a share of the orderings that estimates their Jaccard similarity |A ∩ B| / |A ∪ B| (Broder 1997).
Signatures are cut into bands; texts sharing a whole band are candidates, and each candidate is confirmed by its exact
similarity, so there are no false positives.
"""

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 5
NUM_HASHES = 128
MIN_RECALL = 0.995


class NearDuplicates:
    """Texts seen so far; `add` answers whether a similar one was among them."""

    def __init__(self, similarity: float, seed: int = 0):
        self.similarity = similarity
        self._band = band_rows(similarity)
        random = np.random.default_rng(seed)
        self._factors = random.integers(1, 2**63, size=(NUM_HASHES, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = random.integers(0, 2**63, size=(NUM_HASHES, 1), dtype=np.uint64)
        self._texts: list[str] = []
        self._pieces: list[NDArray[np.uint64]] = []
        self._buckets: dict[tuple[int, bytes], list[int]] = {}

    def add(self, text: str) -> str | None:
        """The earlier text whose similarity to this one is at least the threshold; None keeps `text` as new."""
        pieces = pieces_of(text)
        bands = self._bands(pieces)
        candidates = {i for band in bands for i in self._buckets.get(band, ())}
        for i in sorted(candidates):
            if self._similar(pieces, self._pieces[i]):
                return self._texts[i]
        for band in bands:
            self._buckets.setdefault(band, []).append(len(self._texts))
        self._texts.append(text)
        self._pieces.append(pieces)
        return None

    def _similar(self, first: NDArray[np.uint64], second: NDArray[np.uint64]) -> bool:
        smaller, larger = sorted((first.size, second.size))
        possible = smaller >= self.similarity * larger  # a smaller set holds at most itself of a larger one
        return possible and jaccard(first, second) >= self.similarity

    def _bands(self, pieces: NDArray[np.uint64]) -> list[tuple[int, bytes]]:
        signature = ((pieces * self._factors + self._offsets) >> np.uint64(32)).min(axis=1)
        rows = signature.astype(np.uint32).reshape(-1, self._band)
        return [(i, row.tobytes()) for i, row in enumerate(rows)]


def band_rows(similarity: float) -> int:
    """Rows per band: as many as still find a pair of exactly this similarity with MIN_RECALL."""
    for rows in (16, 8, 4, 2):
        if 1 - (1 - similarity**rows) ** (NUM_HASHES // rows) >= MIN_RECALL:
            return rows
    return 1


def pieces_of(text: str) -> NDArray[np.uint64]:
    """The distinct 5-byte pieces of a text, white space and case ignored, each as one integer."""
    data = " ".join(text.lower().split()).encode().ljust(PIECE_BYTES)
    letters = np.frombuffer(data, np.uint8).astype(np.uint64)
    count = letters.size - PIECE_BYTES + 1
    packed = letters[:count].copy()
    for place in range(1, PIECE_BYTES):
        packed |= letters[place : place + count] << np.uint64(8 * place)
    return np.unique(_mixed(packed))


def jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """|A ∩ B| / |A ∪ B| of two sets given as sorted unique arrays."""
    common = np.intersect1d(first, second, assume_unique=True).size
    return common / (first.size + second.size - common)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A one-to-one scramble of 64-bit integers (splitmix64's finisher), so that orderings are not by spelling."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
