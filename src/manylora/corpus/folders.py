"""Which files of a folder are tasks.

    folder/maths.jsonl                       the task "maths"
    folder/maths-00000-of-00002.parquet      a shard of the task "maths"
    folder/maths/any.jsonl, .../other.csv    shards of the task "maths"

What has another suffix, a hidden name, or the name that a description of data has
(manifest.json, dataset_info.json and the like) is no task; `files_not_read` lists it.
Every other file of data is read, and one that is no table of rows is an error that names it.
"""

from __future__ import annotations

import re
from pathlib import Path

from manylora.corpus.layouts import CorpusError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = tuple(f"{suffix}.gz" for suffix in SUFFIXES if suffix != ".parquet")

_DESCRIPTIONS = {
    "manifest",
    "metadata",
    "config",
    "dataset_info",
    "dataset_infos",
    "dataset_dict",
    "state",
    "schema",
}
_SPLITS = {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}
_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})")


def suffix_of(path: Path) -> str:
    """The suffix that says the format, .gz left out; empty if the format is not known."""
    name = path.name.lower()
    ends = [suffix for suffix in (*PACKED, *SUFFIXES) if name.endswith(suffix)]
    return ends[0].removesuffix(".gz") if ends else ""


def task_files(path: Path) -> dict[str, list[Path]]:
    """The files of each task, for one file or a folder; names that differ in case alone clash."""
    path = Path(path)
    if not path.exists():
        raise CorpusError(f"{path}: no such file or folder. Give a file of rows or a folder.")
    if not path.is_dir():
        return {_task(path): [path]}
    files, _ = _sorted_out(path)
    if not files:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise CorpusError(
            f"{path}: no file of rows here ({', '.join(SUFFIXES)}, perhaps .gz), found {found}. "
            "Put one file a task into it, named after the task."
        )
    tasks: dict[str, list[Path]] = {}
    for file in files:
        inside = file.relative_to(path).parts
        tasks.setdefault(inside[0] if len(inside) > 1 else _task(file), []).append(file)
    _check_names(path, tasks)
    for task, parts in tasks.items():
        _check_parts(path, task, parts)
    return dict(sorted(tasks.items()))


def files_not_read(path: Path) -> list[Path]:
    """The files of a folder of tasks that are no tasks, hidden ones left out."""
    return _sorted_out(path)[1] if Path(path).is_dir() else []


def _sorted_out(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files of rows, other files), at any depth, in the order of their names."""
    read: list[Path] = []
    other: list[Path] = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder).parts
        if any(part.startswith((".", "_")) for part in inside) or file.is_dir():
            continue
        described = suffix_of(file) == ".json" and file.stem.lower() in _DESCRIPTIONS
        (read if suffix_of(file) and not described else other).append(file)
    return read, other


def _stem(file: Path) -> str:
    """The name without suffixes; that of an unknown format without the last."""
    name = file.name[: -len(".gz")] if file.suffix.lower() == ".gz" else file.name
    return Path(name).stem


def _task(file: Path) -> str:
    match = _SHARD.fullmatch(_stem(file))
    return match[1] if match else _stem(file)


def _check_names(folder: Path, tasks: dict[str, list[Path]]) -> None:
    seen: dict[str, str] = {}
    for task, files in tasks.items():
        other = seen.setdefault(task.casefold(), task)
        if other != task:
            raise CorpusError(
                f"{files[0]}: the same task name as {tasks[other][0].relative_to(folder)}: a "
                "file's name is its task's name, upper and lower case taken as one. Rename one, or "
                "join the two."
            )
    if len(tasks) > 1 and "train" in seen and set(seen) <= _SPLITS:
        names = ", ".join(tasks)
        raise CorpusError(
            f"{folder}: {names} are splits of one data set by their names, not tasks. Make folders "
            "train/ and test/ of files named after their task, or give the file to train on."
        )


def _check_parts(folder: Path, task: str, files: list[Path]) -> None:
    """One file; or files of a sub-folder; or all shards of one set."""
    if (folder / task).is_dir():
        beside = [file for file in files if file.parent == folder]
        splits = {_task(file).casefold() for file in files}
        if beside:
            raise CorpusError(
                f"{beside[0]}: the same task name as the folder {task}/. Rename one, or move the "
                "file into it."
            )
        if len(splits) > 1 and "train" in splits and splits <= _SPLITS:
            raise CorpusError(
                f"{folder / task}: {', '.join(sorted(splits))} in one task: rows to test on would "
                "be trained on. Give the files to train on alone, or folders train/ and test/."
            )
    elif len(files) > 1 and not all(_SHARD.fullmatch(_stem(file)) for file in files):
        raise CorpusError(
            f"{files[1]}: the same task name as {files[0].name}: a file's name is its task's "
            "name. Rename one, or join the two files."
        )
    _check_shards(files)


def _check_shards(files: list[Path]) -> None:
    for file in files:
        match = _SHARD.fullmatch(_stem(file))
        if match is None:
            continue
        name, _, wanted = match.groups()
        there = {
            part[2]
            for other in files
            if (part := _SHARD.fullmatch(_stem(other))) and part[1] == name and part[3] == wanted
        }
        if len(there) != int(wanted):
            raise CorpusError(
                f"{file}: {len(there)} of the {int(wanted)} shards are there. Add the others, or "
                "rename the files if these are all."
            )
