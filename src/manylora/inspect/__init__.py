"""What went on inside a run: tables first (pandas), figures and pages made from them.

    from manylora.inspect import inspect
    found = inspect("runs/hydra", "runs/lora")     # as `manylora inspect`, without the page
    found.frames["spectra"]                        # a table; frames.py lists them all

    from manylora.inspect.figures import figures
    figures(found)["spectra"].savefig("spectra.png")

Each measure by itself: a module of this package with a function of the same name, as
`manylora.inspect.spectra.spectra(manylora.inspect.adapters.read(folder))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from manylora.inspect.frames import Inspection

__all__ = ["inspect"]


def inspect(
    *runs: str | Path,
    interference: bool = False,
    leave_out: Sequence[str] = (),
    rows: int | None = None,
    method: Literal["tsne", "umap"] = "tsne",
) -> Inspection:
    """Look into one run or adapter folder, or into several side by side.

    interference: also gradients between tasks, on `rows` held-out rows of each (default 16).
    leave_out: also train again without each of these tasks. method: of the matrices on a plane.

    Raises FileNotFoundError and ValueError for a folder without an update, for a run given twice,
    and for what was asked for and cannot be measured.
    """
    from rich.console import Console

    from manylora.inspect.gather import Options, everything
    from manylora.inspect.interference import ROWS

    if not runs:
        raise ValueError("no run was given; give the folders to look into")
    options = Options(interference, tuple(leave_out), rows or ROWS, method)
    return everything([Path(run) for run in runs], options, Console(stderr=True))
