"""MinHash against brute force."""

import random

import numpy as np
import pytest

from hass_core.data.dedupe import MIN_RECALL, NUM_HASHES, NearDuplicates, band_rows, jaccard, pieces_of

WORDS = ["red", "blue", "small", "large", "house", "river", "tree", "slowly", "runs", "over", "under", "the", "a"]


def brute_force_jaccard(first: str, second: str) -> float:
    sets = [set(), set()]
    for text, pieces in zip((first, second), sets, strict=True):
        data = " ".join(text.lower().split()).encode().ljust(5)
        pieces.update(data[i : i + 5] for i in range(len(data) - 4))
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def varied(text: str, changes: int, rng: random.Random) -> str:
    words = text.split()
    for _ in range(changes):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


def texts(count: int) -> list[str]:
    rng = random.Random(1)
    originals = [" ".join(rng.choices(WORDS, k=30)) for _ in range(count // 2)]
    return originals + [varied(rng.choice(originals), rng.randrange(6), rng) for _ in range(count // 2)]


def test_similarity_is_the_exact_jaccard():
    sample = texts(40)
    for first, second in zip(sample, reversed(sample), strict=True):
        assert jaccard(pieces_of(first), pieces_of(second)) == pytest.approx(brute_force_jaccard(first, second))


def test_finds_what_brute_force_finds():
    similarity = 0.8
    found = NearDuplicates(similarity)
    kept: list[str] = []
    for text in texts(300):
        expected = any(brute_force_jaccard(text, other) >= similarity for other in kept)
        assert (found.add(text) is not None) == expected
        if not expected:
            kept.append(text)
    assert 150 <= len(kept) < 300


@pytest.mark.parametrize("text", ["", "Hi", "日本語"])
def test_short_texts_equal_themselves_only(text):
    found = NearDuplicates(0.8)
    assert found.add(text) is None
    assert found.add(text) == text
    assert found.add("something else entirely") is None


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_find_a_pair_at_the_threshold(similarity):
    rows = band_rows(similarity)
    assert 1 - (1 - similarity**rows) ** (NUM_HASHES // rows) >= MIN_RECALL


def test_pieces_are_sorted_and_distinct():
    pieces = pieces_of("a b a b a b a b")
    assert np.all(pieces[1:] > pieces[:-1])
