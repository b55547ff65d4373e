"""What an export is, where it is noted, and the folder that is either whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from manylora.training.checkpoints import new_partial, write_atomically

EXPORTS_FILE = "exports.json"
TOLERANCE = 1e-3  # of a logit, in float32


class ExportError(RuntimeError):
    """An export that is impossible, or that did not reproduce the run it was made from."""


@dataclass(frozen=True)
class Export:
    """One exported folder or file.

    kind: lora, merged, gguf or gguf-lora. max_logit_difference: to the live run (for an
    approximation to the run with its mixing weights fixed so), in a process without manylora or
    read back from the file; in float32, but with the rounding of a model saved in half precision.
    gap: for a measured static export, by task [mean, low, high] of
    (NLL static - NLL live) / (NLL base - NLL live), 95 % bootstrap interval over held-out rows.
    """

    path: str
    kind: str
    exact: bool
    max_logit_difference: float
    note: str
    gap: dict[str, list[float]] = field(default_factory=dict)


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A folder to write to: it becomes `output` when the block ends, and goes when it fails.

    Raises ExportError when there is something at `output` already.
    """
    output = output.absolute()
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is a file; choose another folder with --output")
    if output.exists() and any(output.iterdir()):
        raise ExportError(f"{output} is not empty; choose another folder with --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = new_partial(output)
    try:
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_close(what: str, difference: float) -> float:
    """The largest difference of a logit, when it is within `TOLERANCE`; else ExportError."""
    if not difference <= TOLERANCE:  # NaN is not
        raise ExportError(
            f"{what}: logits differ from the live run by {difference:.2e}, more than "
            f"{TOLERANCE:.0e}; nothing was kept. Please report it with the recipe"
        )
    return difference


def record(run: Path, exports: Sequence[Export]) -> list[Export]:
    """Add to the run's exports.json, which the report shows; what is written anew replaces."""
    path = run / EXPORTS_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = [asdict(export) for export in exports]
    paths = {entry["path"] for entry in new}
    kept = [entry for entry in known if entry["path"] not in paths]
    write_atomically(path, json.dumps(kept + new, indent=2))
    return list(exports)
