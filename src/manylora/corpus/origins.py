"""Where rows come from: the recipe's `data` taken apart into files and hub data sets.

my/tasks                    a folder: one file or sub-folder a task, perhaps in train/ and test/
rows.csv                    one file
owner/name[/config][@rev]   a data set on the hub, where no such path is here
[one.jsonl, more/]          several of these
{task: path or hub name}    with names of your own
samples                     the tasks that are part of the package
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from manylora.corpus.hub import hub_splits, is_hub_name, pinned, read_hub
from manylora.corpus.layouts import CorpusError, Example, Fields
from manylora.corpus.readers import read_examples, task_files

Data = str | list[str] | dict[str, str]

BUNDLED = "samples"


@dataclass(frozen=True)
class Part:
    """Rows of one file, or of one split of a hub data set.

    task: of all rows, unless a field names it; None: the data set's name.
    """

    task: str | None
    where: str
    split: str = ""

    def identity(self) -> list[object]:
        """Plain values that change when the rows do."""
        if self.split:
            return [self.task, self.where, self.split]
        path = Path(self.where)
        try:
            known = path.stat()
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error.strerror}).") from error
        return [self.task, str(path.resolve()), known.st_size, known.st_mtime_ns]

    def examples(self, fields: Fields, unread: set[str]) -> Iterator[Example | CorpusError]:
        if self.split:
            return read_hub(self.where, fields, self.split, self.task, unread=unread)
        return read_examples(Path(self.where), fields, self.task, unread=unread)


def refuse_empty(data: Data | Path) -> None:
    """CorpusError where `data` names nothing: an empty path would be the working directory."""
    several = list(data.values()) if isinstance(data, dict) else data
    several = several if isinstance(several, list) else [str(several)]
    if several and all(str(where).strip() for where in several):
        return
    what = "data has an empty entry" if len(several) > 1 else "data is empty"
    raise CorpusError(f"{what}. Give a file, a folder of task files, a hub data set, or `samples`.")


def samples_path() -> Path:
    """The folder of small real tasks that is part of the package (see DATA_LICENSES.md)."""
    return Path(str(files("manylora.corpus"))) / "samples"


def absolute(data: Data) -> Data:
    """The same data wherever it is read: paths absolute, hub names with their commit."""
    if isinstance(data, list):
        return [_absolute(where) for where in data]
    if isinstance(data, dict):
        return {task: _absolute(where) for task, where in data.items()}
    return _absolute(data)


def _absolute(where: str) -> str:
    if where == BUNDLED:
        return where
    return pinned(where) if is_hub_name(where) else str(Path(where).resolve())


def train_and_test(data: Data | Path) -> tuple[list[Part], list[Part]]:
    """What to train on, and what to hold out where the data say so themselves (else nothing)."""
    refuse_empty(data)
    if isinstance(data, dict):
        parts = [part for task, where in data.items() for part in _parts(where, task)]
        return parts, []
    if isinstance(data, list):
        return _joined(data), []
    if is_hub_name(str(data)):
        name = pinned(str(data))
        return _parts(name), [Part(None, name, "test")] if "test" in hub_splits(name) else []
    path = samples_path() if str(data) == BUNDLED else Path(data)
    train, test = path / "train", path / "test"
    for there, missing in ((train, test), (test, train)):
        if there.is_dir() and not missing.is_dir():
            raise CorpusError(
                f"{data}: has {there.name}/ but no {missing.name}/. Add {missing.name}/ with one "
                f"file a task, or give {there} itself to have held-out rows chosen from it."
            )
    return (_parts(str(train)), _parts(str(test))) if train.is_dir() else (_parts(str(path)), [])


def _parts(where: str, task: str | None = None) -> list[Part]:
    if is_hub_name(where):
        return [Part(task, pinned(where), "train")]
    path = samples_path() if where == BUNDLED else Path(where)
    return [
        Part(own if task is None else task, str(file))
        for own, paths in task_files(path).items()
        for file in paths
    ]


def _joined(several: list[str]) -> list[Part]:
    owners: dict[str, str] = {}
    parts: list[Part] = []
    seen: set[Path | str] = set()
    for where in several:
        for part in _parts(where):
            place = part.where if part.split else Path(part.where).resolve()
            if place in seen:
                raise CorpusError(
                    f"{part.where} is given twice, so its rows would be as well. Give it once."
                )
            seen.add(place)
            if part.task is not None and owners.setdefault(part.task, where) != where:
                raise CorpusError(
                    f"{where}: task {part.task!r} is in {owners[part.task]} already. Give names: "
                    "data: {TASK: PATH, ...}."
                )
            parts.append(part)
    return parts
