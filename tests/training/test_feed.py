"""Reading ahead: order, errors and ends."""

import threading
from collections.abc import Callable, Iterator

import pytest

from hass_core.training.feed import Prefetcher


def test_results_come_in_order_and_are_begun_before_they_are_asked_for():
    planned, begun, may_end = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def job(number: int) -> int:
        begun.release()
        may_end.wait(10)
        return number

    def jobs() -> Iterator[Callable[[], int]]:
        number = 0
        while True:
            planned.release()
            yield lambda number=number: job(number)
            number += 1

    steps = Prefetcher(jobs(), threads=3, ahead=5)
    assert all(begun.acquire(timeout=10) for _ in range(3)), "nobody has asked yet"
    assert all(planned.acquire(timeout=10) for _ in range(5))
    assert not planned.acquire(blocking=False), "no more than were to be ahead"
    may_end.set()
    assert [next(steps) for _ in range(20)] == list(range(20))
    steps.close()


def test_an_error_is_raised_where_its_result_was_due():
    def jobs() -> Iterator[Callable[[], float]]:
        yield lambda: 1.0
        yield lambda: 1 / 0
        yield lambda: 3.0
        raise ValueError("the plan fails")

    steps = Prefetcher(jobs(), threads=2)
    assert next(steps) == 1
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert next(steps) == 3
    with pytest.raises(ValueError, match="the plan fails"):
        next(steps)
    steps.close()


def test_closing_ends_the_jobs_and_the_threads():
    ended = threading.Event()

    def jobs() -> Iterator[Callable[[], int]]:
        try:
            while True:
                yield lambda: 1
        finally:
            ended.set()

    before = set(threading.enumerate())
    steps = Prefetcher(jobs(), threads=2, ahead=6)
    assert next(steps) == 1
    steps.close()
    assert ended.is_set()
    assert set(threading.enumerate()) <= before  # threads of other tests may have ended meanwhile
