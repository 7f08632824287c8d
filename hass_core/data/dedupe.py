"""Near-duplicate texts by MinHash with locality-sensitive hashing.

A text becomes the set of its 5-byte pieces. MinHash keeps, for each of 128 random orderings, the smallest piece:
two sets agree in a share of the orderings that estimates their Jaccard similarity |A ∩ B| / |A ∪ B| (Broder 1997).
Signatures are cut into bands; texts sharing a whole band are candidates, and each candidate is confirmed by its exact
similarity, so there are no false positives. A bitmap per text rules most candidates out before that: it bounds the
similarity from above.
"""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 5
PIECE_MASK = np.uint64(2 ** (8 * PIECE_BYTES) - 1)
NUM_HASHES = 128
MIN_RECALL = 0.995
BITMAP_BITS = 2048
NOBODY = -1


@dataclass(frozen=True, slots=True)
class Sketch:
    """A set of pieces in little room: bit `piece mod BITMAP_BITS` is set for each of them."""

    size: int
    bitmap: int
    collisions: int  # pieces that found their bit set already


@dataclass(frozen=True, slots=True)
class Signature:
    """What is compared of a text: one integer for each band, equal for equal bands, and the sketch."""

    bands: list[int]
    sketch: Sketch


class Signer:
    """Signs texts; equal similarities and seeds give equal signatures, in every process."""

    def __init__(self, similarity: float, seed: int = 0):
        self.rows = band_rows(similarity)
        random = np.random.default_rng(seed)
        self._factors = random.integers(0, 2**31, size=(NUM_HASHES, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self._folds = random.integers(0, 2**64, size=NUM_HASHES, dtype=np.uint64) | np.uint64(1)

    def sign(self, text: str) -> Signature:
        """The text's signature."""
        pieces = pieces_of(text)
        return Signature(self.bands(pieces), sketch_of(pieces))

    def bands(self, pieces: NDArray[np.uint64]) -> list[int]:
        """One integer for each band of the signature; equal bands have equal ones."""
        signature = ((pieces >> np.uint64(32)).astype(np.uint32) * self._factors).min(axis=1)
        return (signature * self._folds).reshape(-1, self.rows).sum(axis=1).tolist()


class NearDuplicates:
    """Texts seen so far; `add` answers whether a similar one was among them."""

    def __init__(self, similarity: float, seed: int = 0):
        self.similarity = similarity
        self._signer = Signer(similarity, seed)
        self._texts: list[str] = []
        self._sketches: list[Sketch] = []
        # chains instead of a list per bucket: millions of small lists would cost memory and the collector's time
        self._latest: list[dict[int, int]] = [{} for _ in range(NUM_HASHES // self._signer.rows)]
        self._earlier = array("i")  # for each text and band: the text before it with the same band, or NOBODY

    def add(self, text: str) -> str | None:
        """The earlier text whose similarity to this one is at least the threshold; None keeps `text` as new."""
        return self.add_signed(text, self._signer.sign(text))

    def add_signed(self, text: str, signature: Signature) -> str | None:
        """The same for a text that is signed already."""
        bands, sketch = signature.bands, signature.sketch
        earlier = [latest.get(band, NOBODY) for latest, band in zip(self._latest, bands, strict=True)]
        for i in sorted(self._candidates(earlier)):
            if (
                most_similar(sketch, self._sketches[i]) >= self.similarity
                and jaccard(pieces_of(text), pieces_of(self._texts[i])) >= self.similarity
            ):
                return self._texts[i]
        for latest, band in zip(self._latest, bands, strict=True):
            latest[band] = len(self._texts)
        self._earlier.extend(earlier)
        self._texts.append(text)
        self._sketches.append(sketch)
        return None

    def _candidates(self, latest: list[int]) -> set[int]:
        """All texts on the chains, one for each band, that end with the `latest` ones."""
        found: set[int] = set()
        for band, i in enumerate(latest):
            while i != NOBODY:
                found.add(i)
                i = self._earlier[i * len(latest) + band]
        return found


def band_rows(similarity: float) -> int:
    """Rows per band: as many as still find a pair of exactly this similarity with MIN_RECALL."""
    for rows in (16, 8, 4, 2):
        if 1 - (1 - similarity**rows) ** (NUM_HASHES // rows) >= MIN_RECALL:
            return rows
    return 1


def pieces_of(text: str) -> NDArray[np.uint64]:
    """The distinct 5-byte pieces of a text, white space and case ignored, each as one integer."""
    data = " ".join(text.lower().split()).encode().ljust(PIECE_BYTES)
    # eight bytes from every place on, of which the first ones count
    windows = np.ndarray(len(data) - PIECE_BYTES + 1, "<u8", data.ljust(len(data) + 8 - PIECE_BYTES), strides=(1,))
    ordered = np.sort(_mixed(windows & PIECE_MASK))
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))]


def sketch_of(pieces: NDArray[np.uint64]) -> Sketch:
    """The sketch of a set of distinct pieces."""
    bits = np.zeros(BITMAP_BITS, np.bool_)
    bits[pieces % np.uint64(BITMAP_BITS)] = True
    return Sketch(pieces.size, int.from_bytes(np.packbits(bits).tobytes()), pieces.size - int(np.count_nonzero(bits)))


def most_similar(first: Sketch, second: Sketch) -> float:
    """A similarity that the two sets cannot exceed.

    Each piece in common has a bit that both set, and shares it with no more pieces than either set has collisions.
    """
    shared = (first.bitmap & second.bitmap).bit_count()
    common = min(shared + min(first.collisions, second.collisions), first.size, second.size)
    return common / (first.size + second.size - common)


def jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """|A ∩ B| / |A ∪ B| of two sets given as sorted unique arrays."""
    common = np.intersect1d(first, second, assume_unique=True).size
    return common / (first.size + second.size - common)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A one-to-one scramble of 64-bit integers, so that orderings are not by spelling."""
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(32)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(32)
    return values
