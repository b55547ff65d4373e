"""The geometry of a comparison's plots: things lie where their axis says."""

from __future__ import annotations

from itertools import pairwise

from manylora.report.comparison_plots import (
    LABEL,
    LogAxis,
    clipped,
    method_plot,
    short,
    size_plot,
    spread,
)


def test_dots_lie_where_the_axis_says() -> None:
    rows = [("lora", "before", (1.0, 0.5, 1.5)), ("ia3", "after", (2.0, 1.0, 2.5))]
    plot = method_plot("nll", "", rows, 0.0, 2, bins=5)
    assert plot.ticks[0] == (0.0, "0") and plot.ticks[-1] == (100.0, "2.5")
    assert [(row.dot.mean, row.dot.low, row.dot.high) for row in plot.rows] == [
        (40.0, 20.0, 60.0),
        (80.0, 40.0, 100.0),
    ]
    assert plot.guide == 0.0
    assert plot.rows[1].dot.label == "2.00 (95 %: 1.00 to 2.50)"


def test_rates_are_on_a_logarithmic_axis() -> None:
    axis = LogAxis(1e-4, 1e-2)
    assert [axis.percent(v) for v in (1e-4, 1e-3, 1e-2)] == [0.0, 50.0, 100.0]
    assert axis.ticks() == [(0.0, "0.0001"), (50.0, "0.001"), (100.0, "0.01")]
    assert [text for _, text in LogAxis(1.5e6, 6e6).ticks()] == ["2M", "5M"]
    assert [short(v) for v in (2e9, 500_000, 20, 0.002)] == ["2B", "500K", "20", "0.002"]


def test_sizes_stand_against_scores_with_the_budget() -> None:
    same = (1.0, 0.9, 1.1)
    rows = [("lora", "before", 1000, same), ("ia3", "after", 10, (2.0, 1.9, 2.1))]
    plot = size_plot([*rows, ("dora", "after", 1000, same)], 1000)
    lora, ia3, dora = plot.points
    assert lora.x == dora.x == plot.budget > ia3.x
    assert lora.y == dora.y > ia3.y
    assert ia3.low > ia3.y > ia3.high
    assert abs(lora.name_y - dora.name_y) >= LABEL
    assert "ia3: 10 parameters, 2.000 (95 %: 1.900 to 2.100)" in ia3.label


def test_labels_stand_apart_and_within_the_plot() -> None:
    for places in ([5.0, 5.0, 5.0], [238.0, 239.0, 240.0], [0.0, 100.0, 240.0], [50.0] * 16):
        found = spread(places, 240)
        tops = sorted(found)
        assert all(b - a >= LABEL - 0.11 for a, b in pairwise(tops))
        assert tops[-1] <= 240 and tops[0] >= 0
    assert spread([0.0, 100.0, 240.0], 240) == [0.0, 100.0, 240.0]


def test_a_long_name_is_clipped_in_plots() -> None:
    assert clipped("branch_per_cluster_shared") == "branch_per_cluster_shared"
    assert clipped("hydralora:num_branches=5,r=16") == "hydralora:num_branches=5,…"
