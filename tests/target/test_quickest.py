"""The fastest way is chosen once for each case, among those that agree with the first."""

import logging

import pytest
import torch

from hass_core.target.quickest import Quickest, graph_seconds

RESULT = torch.ones(4)


class Ways:
    """Ways that say their name, and how long each is said to take."""

    def __init__(self, **seconds):
        self.ran, self.seconds, self.timed = "", seconds, []

    def results(self, **results):
        def way(name, result):
            def run():
                self.ran = name
                if isinstance(result, Exception):
                    raise result
                return result

            return run

        return {name: way(name, results.get(name, RESULT)) for name in self.seconds}

    def time(self, way):
        way()
        self.timed.append(self.ran)
        return self.seconds[self.ran]


def test_the_fastest_is_chosen_once_for_each_case():
    ways = Ways(trusted=2.0, other=1.0)
    quickest = Quickest(ways.time)
    for case, fastest in (("a", "other"), ("b", "trusted"), ("a", "other"), ("b", "trusted")):
        ways.seconds = {"trusted": 2.0 if case == "a" else 0.5, "other": 1.0}
        assert quickest(case, ways.results()) is RESULT
        assert ways.ran == fastest
    assert ways.timed == ["trusted", "other"] * 2


@pytest.mark.parametrize("result", [RESULT * 1.5, RESULT * torch.nan, RuntimeError("no room")])
def test_a_way_that_fails_or_computes_something_else_is_named_and_not_used(result, caplog):
    ways = Ways(trusted=2.0, other=1.0)
    with caplog.at_level(logging.WARNING):
        assert Quickest(ways.time)("a", ways.results(other=result)) is RESULT
    assert ways.timed == ["trusted"]
    assert "other is not used for a" in caplog.text


def test_rounding_is_no_difference():
    ways = Ways(trusted=2.0, other=1.0)
    Quickest(ways.time)("a", ways.results(other=RESULT * 1.05))
    assert ways.ran == "other"


def test_the_first_way_may_not_fail():
    ways = Ways(trusted=2.0, other=1.0)
    with pytest.raises(RuntimeError, match="no room"):
        Quickest(ways.time)("a", ways.results(trusted=RuntimeError("no room")))


def test_while_a_graph_is_captured_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ways = Ways(trusted=2.0, other=1.0)
    Quickest(ways.time)("a", ways.results())
    assert (ways.ran, ways.timed) == ("trusted", [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ways_are_timed_from_a_graph():
    x = torch.zeros(1 << 26, device="cuda")
    assert 0 < graph_seconds(lambda: x[:1] + 1) < graph_seconds(lambda: x + 1)
