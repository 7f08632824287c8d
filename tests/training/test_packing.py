"""Packs: every conversation once a pass, resumable anywhere, whoever takes them."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hass_core.errors import BadInput
from hass_core.training.feed import (
    WINDOW_BLOCKS,
    Division,
    Group,
    PackStream,
    packs_of_pass,
    read_ahead,
    sample_order,
    windows_ahead,
)

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=300)


@given(LENGTHS, st.integers(0, 5), st.integers(0, 3))
def test_a_pass_holds_every_conversation_once_and_packs_fit(lengths, seed, number):
    packs = packs_of_pass(lengths, 64, seed, number)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[i] for i in pack) <= 64


@given(LENGTHS, st.integers(0, 40))
def test_the_stream_continues_anywhere(lengths, start):
    stream = PackStream(lengths, 64, seed=3)
    whole = list(islice(stream.passes(), start + 10))
    assert list(islice(stream.passes(start), 10)) == whole[start:]


@given(LENGTHS)
def test_whole_passes_are_counted_exactly(lengths):
    stream = PackStream(lengths, 64, seed=1)
    first_two = list(islice(stream.passes(), stream.packs_in(2)))
    seen = sorted(i for pack in first_two for i in pack)
    assert seen == sorted([*range(len(lengths)), *range(len(lengths))])


@given(st.integers(1, 5), st.integers(1, 3), st.none() | st.integers(1, 6))
def test_processes_divide_a_step_without_loss_or_overlap(packs_per_process, processes, most):
    packs = [[i] for i in range(packs_per_process * processes)]
    shares = [Division(len(packs), most, processes, rank).own(packs) for rank in range(processes)]
    groups = [group for share in shares for group in share]
    assert [pack for group in groups for pack in group.packs] == packs
    assert all(group.packs[0] == packs[group.first] for group in groups), "each pack knows its number in the step"
    assert all(len(group.packs) <= (most or len(packs)) for group in groups)
    assert len({len(share) for share in shares}) == 1, "processes that wait for each other run backward equally often"


def test_a_step_that_processes_cannot_share_is_refused():
    with pytest.raises(BadInput, match=r"training\.packs_per_step = 8 cannot be divided evenly among 3 processes"):
        Division(8, None, 3)


def test_packs_are_well_filled():
    lengths = [20 + i * 7 % 300 for i in range(2000)]
    packs = packs_of_pass(lengths, 2048, 0, 0)
    assert sum(lengths) / (len(packs) * 2048) > 0.98


def test_passes_differ_and_seeds_differ():
    lengths = list(range(1, 60))
    assert packs_of_pass(lengths, 64, 0, 0) == packs_of_pass(lengths, 64, 0, 0)
    assert packs_of_pass(lengths, 64, 0, 0) != packs_of_pass(lengths, 64, 0, 1)
    assert packs_of_pass(lengths, 64, 0, 0) != packs_of_pass(lengths, 64, 1, 0)


@given(LENGTHS, st.integers(0, 3), st.integers(0, 2), st.data())
def test_a_pass_mixes_few_row_groups_at_a_time(lengths, seed, number, data):
    inner = data.draw(st.lists(st.integers(1, len(lengths)), unique=True, max_size=60))
    blocks = sorted({0, *(i for i in inner if i < len(lengths))})
    packs = packs_of_pass(lengths, 64, seed, number, blocks)
    order = [i for pack in packs for i in pack]
    assert sorted(order) == list(range(len(lengths)))
    group = {i: sum(first <= i for first in blocks) for i in order}
    seen = list(dict.fromkeys(group[i] for i in order))
    for start in range(0, len(seen), WINDOW_BLOCKS):  # every window is used up before the next one begins
        window = set(seen[start : start + WINDOW_BLOCKS])
        places = [place for place, i in enumerate(order) if group[i] in window]
        assert places == list(range(places[0], places[0] + len(places)))


@given(st.integers(1, 120), st.integers(1, 40))
def test_steps_are_asked_for_ahead_and_none_is_lost(count, ahead):
    warmed: list[int] = []

    class Dataset:
        def many(self, indices):
            raise AssertionError(indices)

        def warm(self, indices):
            warmed.extend(indices)

    steps, drawn = [[Group(0, [[i]]), Group(1, [[count + i]])] for i in range(count)], []
    coming = read_ahead((drawn.append(step) or step for step in steps), Dataset(), ahead)
    for number, step in enumerate(coming):
        assert step == steps[number]
        assert len(drawn) >= min(count, number + 1 + ahead // 2)
    assert number + 1 == count
    assert set(warmed) <= set(range(2 * count))


@given(st.integers(0, 300), st.integers(0, 3))
def test_a_sample_is_drawn_from_all_over_and_goes_on_to_everything(count, seed):
    order = sample_order(count, seed)
    assert sorted(order) == list(range(count))
    blocks = max(1, count // 64)
    if count >= 64:
        assert len({i * blocks // count for i in order[: 8 * blocks]}) == blocks


@pytest.mark.parametrize(("groups", "windows"), [(0, 0.75), (32, 0.75), (40, 1.25), (52, 2.0), (500, 2.0)])
def test_what_is_read_ahead_fits_the_memory_beside_what_is_trained_on(groups, windows):
    assert windows_ahead(groups) == windows
