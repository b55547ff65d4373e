"""What `manylora inspect` computed of a run, kept in the run's folder: RUN/inspection/NAME.parquet.

So a report that is written again shows it again, and an inspection that is repeated starts from it.
A table belongs to the files that it was computed from; where one of them has changed since, it is
not shown any more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from manylora.adapter.checking import WEIGHTS_FILE
from manylora.inspect.full_update import FULL_UPDATE_FILE
from manylora.inspect.routing import ROUTING_FILE
from manylora.training.checkpoints import write_atomically

FOLDER = "inspection"
ABOUT_FILE = "inspection.json"
FORMAT = 1  # what a table has and means; those of another are computed again
SOURCES = (WEIGHTS_FILE, FULL_UPDATE_FILE, ROUTING_FILE)


def write_kept(run: Path, frames: Mapping[str, pd.DataFrame]) -> None:
    """Keep these tables, beside those that are kept already."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    state = state_of(run)
    about = _read_about(run)
    for name, frame in frames.items():
        frame.to_parquet(folder / f"{name}.parquet", index=False)
        about[name] = state
    write_atomically(folder / ABOUT_FILE, json.dumps(about, indent=2))


def read_kept(run: Path) -> dict[str, pd.DataFrame]:
    """The tables that were computed from the files as they are now.

    Raises ValueError for a file that is damaged.
    """
    folder = run / FOLDER
    if not (folder / ABOUT_FILE).is_file():
        return {}
    try:
        state = state_of(run)
        names = [name for name, of in _read_about(run).items() if of == state]
        return {name: pd.read_parquet(folder / f"{name}.parquet") for name in names}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: cannot be read ({error}); delete the folder, and make it again with "
            f"`manylora inspect {run}`"
        ) from None


def _read_about(run: Path) -> dict[str, str]:
    path = run / FOLDER / ABOUT_FILE
    about: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return about


def state_of(run: Path) -> str:
    """Changes when a file changes that the tables are computed from."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for name in SOURCES:
        if (run / name).is_file():
            with (run / name).open("rb") as file:
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
