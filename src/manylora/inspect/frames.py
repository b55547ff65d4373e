"""What an inspection found: one table a measure, long form, one row an observation.

A measure knows nothing of pages or figures, and they know a measure by the columns below alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from manylora.findings import Finding

# Columns that a table must have; it may have more.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "singular_values": ("run", "layer", "module", "depth", "part", "index", "value"),
    "spectra": (
        *("run", "layer", "module", "depth", "part", "rank", "frobenius"),
        *("top1", "top_quarter", "entropy", "effective_rank", "gini"),
    ),
    "subspaces": ("layer", "module", "depth", "left", "right", "side", "i", "j", "phi"),
    "projection": ("run", "layer", "module", "depth", "part", "matrix", "x", "y"),
    "initialisation": (
        *("layer", "module", "depth", "matrix", "left", "right"),
        *("similarity", "at_start", "of_change", "explained"),
    ),
    "likeness": ("matrix", "pair", "layers", "measure", "mean", "low", "high"),
    "usage": ("run", "layer", "module", "depth", "task", "branch", "weight"),
    "entropy": ("run", "layer", "module", "depth", "task", "of_mean", "mean_of_tokens"),
    "information": ("run", "layer", "module", "depth", "nats", "share"),
    "tokens": ("run", "layer", "task", "example", "position", "text", "branch", "weight"),
    "confusion": ("run", "task", "branch", "rows"),
    "distances": ("run", "task", "branch", "distance", "threshold", "accepted"),
    "interference": ("run", "layer", "module", "depth", "part", "task", "other", "cosine"),
    "transfer": ("run", "left_out", "task", "nll", "low", "high"),
    "training": ("run", "step", "what", "of", "value"),
}


@dataclass(frozen=True, slots=True)
class Inspection:
    """The tables of one run, or of several side by side.

    runs: their names, in the order given. frames: measure -> table. missing: measure -> why it is
    not there and what would give it. findings: run -> what is wrong in it, and what to change.
    """

    runs: list[str]
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for a table that lacks a column, KeyError for an unknown measure."""
        for name, frame in self.frames.items():
            lacking = [column for column in COLUMNS[name] if column not in frame.columns]
            if lacking:
                raise ValueError(
                    f"the table of {name!r} lacks {', '.join(lacking)}; it has "
                    f"{', '.join(map(str, frame.columns))}"
                )

    def frame(self, name: str) -> pd.DataFrame | None:
        """The table of a measure, or None where it was not measured or has no rows."""
        found = self.frames.get(name)
        return None if found is None or found.empty else found
