"""Task files on disk, and the examples they hold.

A task is one JSONL file, and the file's name is the task's name. A row is an object

    {"instruction": str, "input": str (may be absent or empty), "output": str}

Other keys are allowed and not read, "task" among them. `example_from_row` is the one place where
a row becomes an `Example`: a new layout is a new branch there. No row is ever skipped: whatever
cannot be used is a `CorpusError` that says where it is, what was found and what to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

SUFFIX = ".jsonl"


class CorpusError(ValueError):
    """The data cannot be used as they are; the message says where, why and what to do."""


@dataclass(frozen=True, slots=True)
class Example:
    task: str
    instruction: str
    input: str
    output: str
    source: str
    """Where the row stands, as "file.jsonl:17"."""

    @property
    def prompt(self) -> str:
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class Corpus:
    """Training and held-out examples by task; a task may be without held-out examples only when
    the given test/ folder has none for it."""

    train: dict[str, list[Example]]
    test: dict[str, list[Example]]

    @property
    def tasks(self) -> list[str]:
        return sorted(self.train)


def samples_path() -> Path:
    """The folder of small real tasks that is part of the package (see DATA_LICENSES.md)."""
    return Path(str(files("manylora.corpus"))) / "samples"


def load_corpus(path: Path, holdout: float = 0.1, seed: int = 0) -> Corpus:
    """Read a folder with train/ and test/ as it is split, or split task files here.

    `holdout` and `seed` are for the second case: they choose each task's held-out rows.
    """
    path = Path(path)
    train_path, test_path = path / "train", path / "test"
    if train_path.is_dir() and test_path.is_dir():
        return _given_split(train_path, test_path)
    for there, missing in ((train_path, "test"), (test_path, "train")):
        if there.is_dir():
            raise CorpusError(
                f"{path}: has {there.name}/ but no {missing}/. Add {missing}/ with one file a "
                f"task, or give {there} itself to have held-out rows chosen from it."
            )
    if not 0.0 < holdout < 1.0:
        raise CorpusError(
            f"holdout={holdout}: it is the part of each task's rows that is kept for "
            "evaluation; give a number between 0 and 1, for instance 0.1."
        )
    train: dict[str, list[Example]] = {}
    test: dict[str, list[Example]] = {}
    for task, examples in read_tasks(path).items():
        train[task], test[task] = _split(task, examples, holdout, seed)
    return Corpus(train, test)


def read_tasks(path: Path) -> dict[str, list[Example]]:
    """The examples of one task file, or of every *.jsonl file of a folder, by task."""
    path = Path(path)
    if not path.exists():
        raise CorpusError(f"{path}: no such file or folder. Give a task file or a folder of them.")
    paths = _task_files(path) if path.is_dir() else [path]
    tasks = {file.stem: _read_file(file) for file in paths}
    return dict(sorted(tasks.items()))


def read_prompts(path: Path) -> list[Example]:
    """The rows of one file to be answered: as for training, but without an output."""
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"{path}: no such file. Give a JSONL file of rows to answer.")
    return _read_file(path, answered=False)


def example_from_row(
    row: dict[str, object], path: Path, line: int, answered: bool = True
) -> Example:
    """One decoded row, found in that line of that file, as an example."""
    where = f"{path}:{line}"
    return Example(
        task=path.stem,
        instruction=_text(row, "instruction", where),
        input=_text(row, "input", where) if "input" in row else "",
        output=_text(row, "output", where) if answered else "",
        source=f"{path.name}:{line}",
    )


def _text(row: dict[str, object], field: str, where: str) -> str:
    if field not in row:
        raise CorpusError(
            f'{where}: no field "{field}"; the row has {", ".join(map(repr, row)) or "no field"}. '
            'A row is {"instruction": ..., "input": ... (optional), "output": ...}.'
        )
    value = row[field]
    if not isinstance(value, str):
        hint = " or leave it out" if field == "input" else ""
        raise CorpusError(
            f'{where}: field "{field}" is {json.dumps(value)[:60]}, not a string. '
            f"Write it in quotes{hint}."
        )
    if field != "input" and not value.strip():
        raise CorpusError(
            f'{where}: field "{field}" is empty. Fill it in, or take the row out of the file.'
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f'{where}: field "{field}" holds half of a surrogate pair, '
            f"{value[error.start : error.end]!a}, not a character. Write the character itself."
        ) from error
    return value


def _task_files(folder: Path) -> list[Path]:
    inside = sorted(folder.iterdir())
    paths = [file for file in inside if file.is_file() and file.suffix.lower() == SUFFIX]
    if not paths:
        found = ", ".join(file.name for file in inside[:5]) or "nothing"
        raise CorpusError(
            f"{folder}: no *{SUFFIX} file here, found {found}. "
            f"Put one file a task into it, named TASK{SUFFIX}."
        )
    seen: dict[str, Path] = {}
    for file in paths:
        other = seen.setdefault(file.stem.casefold(), file)
        if other is not file:
            raise CorpusError(
                f"{file}: the same task name as {other.name}: a file's name is its task's name, "
                "upper and lower case taken as one. Rename one, or join the two files."
            )
    return paths


def _read_file(path: Path, answered: bool = True) -> list[Example]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}). Check the file.") from error
    examples = []
    for number, line in _lines(path, content):
        row = _parse(line, f"{path}:{number}")
        examples.append(example_from_row(row, path, number, answered))
    if not examples:
        raise CorpusError(f"{path}: holds no row. Write one JSON object a line, or remove it.")
    return examples


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, str]]:
    """The lines that are not blank. Bytes are split, for a JSON string may hold U+2028 bare."""
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{path}:{number}: not UTF-8 text: byte 0x{raw[error.start]:02x} at position "
                f"{error.start} of the line. Save the file as UTF-8."
            ) from error
        if line.strip():
            yield number, line


def _parse(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"{where}: not JSON: {error}; found {line.strip()[:60]!r}. "
            "Write one whole JSON object on each line."
        ) from error
    if not isinstance(row, dict):
        raise CorpusError(
            f"{where}: a JSON {type(row).__name__}, not an object; found {line.strip()[:60]!r}. "
            'A row is {"instruction": ..., "input": ... (optional), "output": ...}.'
        )
    return row


def _given_split(train_path: Path, test_path: Path) -> Corpus:
    train, test = read_tasks(train_path), read_tasks(test_path)
    for task in test:
        if task not in train:
            raise CorpusError(
                f"{test_path / task}{SUFFIX}: no task {task!r} in {train_path}, which has "
                f"{', '.join(train)}. Add {train_path / task}{SUFFIX} or remove the test file."
            )
    return Corpus(train, test)


def _split(
    task: str, examples: list[Example], holdout: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Held-out rows by content, so that the order of the file does not matter.

    Rows with one (instruction, input) form a group, which falls on one side as a whole. Groups are
    taken in the order of their hash as long as they fit; at least one is taken.
    """
    if len(examples) < 2:
        raise CorpusError(
            f"{examples[0].source}: task {task!r} has one row, and one is needed for training and "
            "one for evaluation. Add rows, or give folders train/ and test/."
        )
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(_content_hash(example, seed), []).append(example)
    if len(groups) < 2:
        raise CorpusError(
            f"{examples[0].source}: the {len(examples)} rows of task {task!r} all have the same "
            "instruction and input, so none can be held out. Add rows, or give train/ and test/."
        )
    wanted = min(max(1, round(holdout * len(examples))), len(examples) - 1)
    held: set[str] = set()
    rows = 0
    for key in sorted(groups):
        if rows + len(groups[key]) <= wanted:
            held.add(key)
            rows += len(groups[key])
    if not held:
        held.add(min(groups, key=lambda key: (len(groups[key]), key)))
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[_content_hash(example, seed) in held].append(example)
    return parts


def _content_hash(example: Example, seed: int) -> str:
    """Case and spacing do not count: rows that differ only in those are the same question."""
    texts = [" ".join(text.split()).casefold() for text in (example.instruction, example.input)]
    return hashlib.sha256(json.dumps([seed, *texts]).encode()).hexdigest()
