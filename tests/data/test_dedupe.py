"""MinHash against brute force."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hass_core.data.dedupe import (
    MIN_RECALL,
    NUM_HASHES,
    NearDuplicates,
    Signer,
    band_rows,
    jaccard,
    most_similar,
    pieces_of,
    sketch_of,
)

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


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1), st.lists(st.integers(0, 6000)), st.data())
def test_the_sketches_bound_the_similarity(wide, narrow, data):
    """Narrow pieces collide often in the bitmap."""
    both = [*wide, *narrow]
    other = data.draw(st.lists(st.sampled_from(both), min_size=1)) + data.draw(st.lists(st.integers(0, 6000)))
    first, second = (np.unique(np.array(pieces, np.uint64)) for pieces in (both, other))
    assert jaccard(first, second) <= most_similar(sketch_of(first), sketch_of(second))
    assert most_similar(sketch_of(first), sketch_of(first)) == 1


PHRASES = st.lists(st.sampled_from([*WORDS, "Straße", "日本語", "İ", "-", "\n"]), max_size=25).map(" ".join)


@given(st.lists(PHRASES, max_size=12), st.data(), st.sampled_from([0.5, 0.8, 1.0]))
def test_answers_are_those_of_comparing_each_pair(originals, data, similarity):
    edits = st.tuples(st.sampled_from(originals or [""]), st.integers(0, 200), st.sampled_from(["", "x", " The ", "é"]))
    edited = [text[:at] + put + text[at:] for text, at, put in data.draw(st.lists(edits, max_size=12))]
    found, kept = NearDuplicates(similarity), []
    for text in [*originals, *edited]:
        similar = [other for other in kept if brute_force_jaccard(text, other) >= similarity]
        assert found.add(text) == (similar[0] if similar else None)
        if not similar:
            kept.append(text)


@pytest.mark.parametrize("similarity", [0.5, 0.8])
def test_pairs_at_the_threshold_are_found(similarity):
    """Not one by one as in the formula but by the hashes themselves, on random sets of exactly this similarity."""
    rng, trials, size = np.random.default_rng(2), 2000, 180
    common = round(2 * size * similarity / (1 + similarity))
    signer, found = Signer(similarity), 0
    for _ in range(trials):
        pieces = rng.integers(0, 2**64, 2 * size - common, dtype=np.uint64)
        first, second = signer.bands(pieces[:size]), signer.bands(pieces[-size:])
        found += any(one == other for one, other in zip(first, second, strict=True))
    assert found / trials >= MIN_RECALL


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
