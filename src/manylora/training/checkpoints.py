"""Files of a run, written so that a kill at any moment leaves each of them whole or absent.

What is written is named `.NAME.partial` first, is forced to the disk, and is then renamed: a rename
happens or does not. No `.partial` is ever read, and the next start sweeps it away.

    RUN/checkpoints/checkpoint-N/    the state after N steps: adapter, optimiser, schedule, random
                                     numbers, trainer_state.json and, written last, progress.pt
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

PARTIAL = ".partial"
CHECKPOINTS = "checkpoints"
PROGRESS_FILE = "progress.pt"
KEPT = 2


def make_writable(folder: Path, what: str, instead: str) -> None:
    """Make the folder and write to it, before anything is computed; OSError when that fails.

    what, instead: what it is and how another is chosen, for the message.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{what} cannot be written: {error.strerror}; choose another with {instead}"
        ) from None


def write_atomically(path: Path, text: str) -> None:
    """Write a text file; a kill or a full disk leaves the one that was there before."""
    partial = partial_of(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def partial_of(path: Path) -> Path:
    """The name under which a file or folder is written."""
    return path.with_name(f".{path.name}{PARTIAL}")


def new_partial(path: Path) -> Path:
    """An empty folder to write in, in the place of an earlier attempt's."""
    partial = partial_of(path)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def publish_folder(written: Path, final: Path) -> None:
    """Give a folder its name, once everything in it is on the disk."""
    sync_tree(written)
    if final.exists():
        remove_folder(final)
    os.replace(written, final)
    sync(final.parent)


def publish_files(written: Path, folder: Path, last: str) -> None:
    """Move each file of a folder into another one; the file `last` tells that all are there."""
    sync_tree(written)
    for path in sorted(written.iterdir()):
        if path.name != last:
            os.replace(path, folder / path.name)
    sync(folder)
    os.replace(written / last, folder / last)
    sync(folder)
    written.rmdir()


def remove_folder(folder: Path) -> None:
    """Rename away first: no half-deleted folder ever has a name that is read."""
    partial = partial_of(folder)
    if partial.exists():
        shutil.rmtree(partial)
    os.replace(folder, partial)
    shutil.rmtree(partial)


def sweep(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for path in partials(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def partials(folder: Path) -> list[Path]:
    """Unfinished files and folders directly in a folder."""
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.name.startswith(".") and p.name.endswith(PARTIAL)]


def checkpoints_of(run: Path) -> list[Path]:
    """The whole checkpoints of a run, in the order of their steps."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in named if (path / PROGRESS_FILE).is_file()), key=step_of)


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = checkpoints_of(run)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def prune(run: Path, keep: int = KEPT) -> None:
    """Remove all but the newest checkpoints."""
    for checkpoint in checkpoints_of(run)[:-keep]:
        remove_folder(checkpoint)


def sync_tree(folder: Path) -> None:
    """Force a folder's files and names to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a network file system that cannot do this for folders
            raise
    finally:
        os.close(handle)
