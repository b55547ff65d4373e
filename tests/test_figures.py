"""The figures of an inspection hold the numbers of its tables."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from inspected import inspection
from manylora.inspect.figures import figures
from manylora.inspect.frames import Inspection

MEASURES = ["singular_values", "spectra", "subspaces", "projection", "usage", "information"]
MEASURES += ["confusion", "interference", "transfer", "training"]


def test_every_measure_that_is_there_has_a_figure_that_can_be_saved(tmp_path: Path) -> None:
    found = figures(inspection(runs=("hydra", "multi")))
    assert list(found) == MEASURES
    for name, figure in found.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=20)
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert plt.get_fignums() == []


def test_measures_that_are_not_there_have_none() -> None:
    frames = inspection().frames
    assert list(figures(Inspection(["hydra"], {"usage": frames["usage"]}))) == ["usage"]


def test_usage_is_drawn_as_it_is_in_the_table() -> None:
    axes = figures(inspection())["usage"].axes[0]
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(
        np.array([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    )
    assert [label.get_text() for label in axes.get_yticklabels()] == ["code", "law", "bank"]


def test_singular_values_are_drawn_over_the_largest() -> None:
    axes = figures(inspection(blocks=1))["singular_values"].axes[0]
    line = axes.lines[0]
    assert np.asarray(line.get_ydata()) == pytest.approx(np.exp(-0.3 * np.arange(4)))
    assert line.get_label() == "hydra: mean routing"
    assert not any("task" in str(line.get_label()) for line in axes.lines)


def test_conflicts_leave_the_diagonal_out_and_centre_the_colours() -> None:
    found = inspection(blocks=1, tasks=("code", "law"))
    found.frames["interference"]["cosine"] = -0.25
    image = figures(found)["interference"].axes[0].images[0]
    assert np.isnan(np.asarray(image.get_array().filled(np.nan)).diagonal()).all()
    assert image.get_clim() == pytest.approx((-0.25, 0.25))
