"""Figures: nothing is drawn over something else, or at the edge."""

from types import SimpleNamespace

import pytest

from hass_core.config import TreeConfig
from hass_core.evaluation import figures


@pytest.mark.parametrize("use", [[[0.9, 0.04, 0.03, 0.02]], [[0.6, 0.1, 0.05, 0.05], [0.3, 0.05], [0.1]]])
def test_the_legend_stands_above_the_bars(use):
    with figures._figure(
        lambda axes: figures._tree_use(axes, SimpleNamespace(tree_use=use, tree=TreeConfig()))
    ) as drawn:
        drawn.draw_without_rendering()
        (axes,) = drawn.axes
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 >= axes.get_window_extent().x0
        assert all(not legend.overlaps(bar.get_window_extent()) for bars in axes.containers for bar in bars)


def test_a_training_of_one_validation_is_seen_whole():
    rows = [{"step": 3, "train/loss": 3.3, "val/loss": 3.5}]
    curves = {"train/loss": "training", "val/loss": "held-out"}
    with figures._figure(lambda axes: figures._curves(axes, rows, curves, "Loss", "loss", 0)) as drawn:
        (axes,) = drawn.axes
        assert axes.get_ylim()[1] > 3.6
        assert all(tick == round(tick) for tick in axes.get_xticks())
