"""The parts of a page that show an inspection, of one run's report or of several runs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.findings import Finding
from manylora.inspect.frames import Inspection
from manylora.report.inspection_interference import InterferenceView, interference_view
from manylora.report.inspection_projection import ProjectionView, projection_view
from manylora.report.inspection_routing import (
    RoutingView,
    SelectorView,
    inspected_routing,
    selector_view,
)
from manylora.report.inspection_spectra import SpectraView, spectra_view
from manylora.report.inspection_subspaces import SubspacesView, subspaces_view
from manylora.report.inspection_training import TrainingView, inspected_training
from manylora.report.inspection_transfer import TransferView, transfer_view
from manylora.report.render import render

TITLES = {
    "spectra": "Directions",
    "subspaces": "Shared directions",
    "projection": "Alike matrices",
    "routing": "Routing",
    "selector": "Selector",
    "interference": "Interference",
    "transfer": "Transfer",
}
MEASURES = {
    "singular_values": "singular values",
    "spectra": "spectra",
    "subspaces": "shared directions",
    "projection": "matrices on a plane",
    "initialisation": "likeness of pairs",
    "likeness": "what the start explains",
    "usage": "branch usage",
    "entropy": "routing entropy",
    "information": "branch and task",
    "tokens": "examples token by token",
    "confusion": "the selector's choices",
    "distances": "the selector's distances",
    "interference": "gradients between tasks",
    "transfer": "a task left out",
    "training": "training",
}


@dataclass(frozen=True, slots=True)
class InspectionView:
    """What the templates draw; a section without its tables is None.

    findings: (run, or "" where there is one run, what was found). missing: (measure, why).
    """

    several: bool
    findings: list[tuple[str, Finding]]
    spectra: SpectraView | None
    subspaces: SubspacesView | None
    projection: ProjectionView | None
    routing: RoutingView | None
    selector: SelectorView | None
    interference: InterferenceView | None
    transfer: TransferView | None
    training: TrainingView | None
    missing: list[tuple[str, str]]

    def entries(self) -> list[tuple[str, str]]:
        """(id, title) of the sections between the findings and the training."""
        shown = {
            "spectra": self.spectra,
            "subspaces": self.subspaces,
            "projection": self.projection,
            "routing": self.routing,
            "selector": self.selector,
            "interference": self.interference,
            "transfer": self.transfer,
        }
        return [(name, TITLES[name]) for name, part in shown.items() if part is not None]

    @property
    def toc(self) -> list[tuple[str, str]]:
        """(id, title) of every section of a page of several runs."""
        return [
            *([("findings", "What stands out")] if self.findings else []),
            *self.entries(),
            *([("training", "Training")] if self.training is not None else []),
            *([("missing", "Not shown")] if self.missing else []),
        ]


def inspection_view(found: Inspection, shown: frozenset[str] = frozenset()) -> InspectionView:
    """The sections; shown: quantities of training that the page has elsewhere."""
    several = len(found.runs) > 1
    return InspectionView(
        several,
        [(run if several else "", f) for run, list_ in found.findings.items() for f in list_],
        spectra_view(found),
        subspaces_view(found),
        projection_view(found),
        inspected_routing(found),
        selector_view(found),
        interference_view(found),
        transfer_view(found),
        inspected_training(found, shown),
        _missing(found.missing),
    )


def _missing(missing: dict[str, str]) -> list[tuple[str, str]]:
    """Measures that lack for one reason share a line."""
    together: dict[str, list[str]] = {}
    for name, why in missing.items():
        together.setdefault(why, []).append(MEASURES[name])
    return [(", ".join(names).capitalize(), why) for why, names in together.items()]


def write_inspection_page(found: Inspection, path: Path, runs: Sequence[tuple[str, str]]) -> Path:
    """Write the page of several runs to `path`; runs: (name, what it is in a few words)."""
    title = f"Inside {len(found.runs)} runs" if len(found.runs) > 1 else f"Inside {found.runs[0]}"
    page = render("inspect.html.j2", title=title, view=inspection_view(found), runs=runs)
    path.write_text(page, encoding="utf-8")
    return path
