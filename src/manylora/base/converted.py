"""Converted models in the cache: built beside their place, renamed when whole, checked by a marker.

A folder counts only with its marker, which is written last and lists every file with its size, so a
killed process leaves nothing that is taken for a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from manylora.cache import cache_folder

MARKER = "manylora_source.json"


class BaseModelError(RuntimeError):
    """The base model cannot be had; the message says what was asked for and what to do."""


def is_complete(folder: Path, sha256: str) -> bool:
    """Whether the folder was made from the file of that SHA-256 and still has all its files."""
    try:
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return record["gguf_sha256"] == sha256 and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def complete_folder(model: str, name: str, sha256: str, make: Callable[[Path, Path], None]) -> Path:
    """The folder `name` of the cache, made by `make(workspace, folder)` unless it is there.

    workspace: an empty folder for what is only needed meanwhile. model: named in an error.
    """
    folder = cache_folder() / name
    if is_complete(folder, sha256):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not is_complete(folder, sha256):
                _build(folder, sha256, make)
    except (OSError, SafetensorError) as error:
        raise BaseModelError(
            f"cannot prepare model={model!r} in {folder.parent}: {error}. Set MANYLORA_CACHE to a "
            "folder that can be written and has the room."
        ) from None
    return folder


def _build(folder: Path, sha256: str, make: Callable[[Path, Path], None]) -> None:
    workspace = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir()
    try:
        finished = workspace / "model"
        make(workspace, finished)
        sizes = {file.name: file.stat().st_size for file in sorted(finished.iterdir())}
        record = {"gguf_sha256": sha256, "files": sizes}
        (finished / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        finished.rename(folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def require_room(folder: Path, needed: float, what: str) -> None:
    """Raise BaseModelError when the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BaseModelError(
            f"{what} needs {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free; "
            "free some space, or set MANYLORA_CACHE to a folder on a larger disk."
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read once: remembered for the same path, size and time of change."""
    known = known_sha256(path)
    if known is not None:
        return known
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    note = _note(path)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f"{note.name}.{os.getpid()}")
        partial.write_text(digest, encoding="utf-8")
        partial.replace(note)
    except OSError as error:
        raise BaseModelError(
            f"cannot write to the cache {cache_folder()}: {error}. Set MANYLORA_CACHE to a folder "
            "that can be written and has the room."
        ) from None
    return digest


def known_sha256(path: Path) -> str | None:
    """The remembered SHA-256 of a file; None when it was never read or has changed since."""
    try:
        digest = _note(path).read_text(encoding="utf-8")
    except OSError:
        return None
    return digest if len(digest) == 64 else None


def _note(path: Path) -> Path:
    state = path.stat()
    key = f"{path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    return cache_folder() / "checksums" / hashlib.sha256(key.encode()).hexdigest()
