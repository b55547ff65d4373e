"""The per-example table of a comparison, and its test rows as aligned arrays.

A row is one held-out example as one run answered it: nll is the summed -log p of the answer in
nats, tokens the length of the answer, correct whether greedy decoding, teacher-forced, gives it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("method", pa.string()),
        ("params", pa.int64()),
        ("lr", pa.float64()),
        ("seed", pa.int64()),
        ("stage", pa.string()),
        ("task", pa.string()),
        ("example", pa.string()),
        ("tokens", pa.int64()),
        ("nll", pa.float64()),
        ("correct", pa.bool_()),
    ]
)
TEST_STAGE = "test"


@dataclass(frozen=True, slots=True)
class TaskRows:
    """One task's rows. tokens: (examples,); nll, correct: (methods, seeds, examples)."""

    task: str
    examples: list[str]
    tokens: Floats
    nll: Floats
    correct: Floats


@dataclass(frozen=True, slots=True)
class Scores:
    """The test rows of every method, seed and task: same examples, in the same order."""

    methods: list[str]
    seeds: list[int]
    tasks: list[TaskRows]

    @staticmethod
    def of(table: pa.Table) -> Scores:
        """The rows of stage "test"; methods and tasks in the order of their first row.

        Raises ValueError that names the cell where a method, seed and task has no rows, other
        examples or answers than the rest, two runs, or a score that is no number.
        """
        rows = _test_rows(table)
        methods, method = _codes(rows["method"])
        tasks, task = _codes(rows["task"])
        examples, example = _codes(rows["example"])
        seeds, seed = np.unique(rows["seed"].to_numpy(), return_inverse=True)
        grid = _Grid(methods, [int(s) for s in seeds], tasks, examples)
        _one_run(rows)
        cell = np.ravel_multi_index((task, method, seed), grid.shape)
        order = np.lexsort((example, cell))
        sizes = np.bincount(cell, minlength=int(np.prod(grid.shape)))
        grid.check_none_is_missing(sizes)
        cells = np.split(order, np.cumsum(sizes)[:-1])
        each = len(methods) * len(seeds)
        starts = range(0, len(cells), each)
        found = [grid.task(rows, cells[at : at + each], example, at // each) for at in starts]
        return Scores(methods, grid.seeds, found)


def _one_run(rows: pa.Table) -> None:
    """Raise ValueError where a method has two runs of one seed."""
    runs = rows.group_by(["method", "seed"]).aggregate([("run", "distinct")])
    for method, seed, names in zip(
        *(runs[name].to_pylist() for name in ("method", "seed", "run_distinct")), strict=True
    ):
        if len(names) > 1:
            raise ValueError(
                f"{method}, seed {seed} has {len(names)} runs: {', '.join(sorted(names))}. "
                "A method is compared at one learning rate: keep the rows of one run."
            )


def _test_rows(table: pa.Table) -> pa.Table:
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"the table lacks the columns {', '.join(missing)}; it has "
            f"{', '.join(table.column_names)}. `manylora compare` writes them all."
        )
    table = table.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
    rows = table.filter(pc.equal(table["stage"], TEST_STAGE))
    if not rows.num_rows:
        raise ValueError(f"none of the {table.num_rows} rows is of stage {TEST_STAGE!r}")
    for name in SCHEMA.names:
        if rows[name].null_count:
            raise ValueError(f"column {name!r} has {rows[name].null_count} empty values")
    broken = rows.filter(pc.invert(pc.is_finite(rows["nll"])))
    if broken.num_rows:
        first = broken.slice(0, 1).to_pylist()[0]
        raise ValueError(
            f"{first['method']}, seed {first['seed']} (run {first['run']}) has {broken.num_rows} "
            f"rows whose nll is no finite number, the first of task {first['task']!r}: the run "
            "diverged. Give the method a lower learning rate, or leave it out."
        )
    empty = rows.filter(pc.less(rows["tokens"], 1))
    if empty.num_rows:
        first = empty.slice(0, 1).to_pylist()[0]
        raise ValueError(
            f"example {first['example']!r} of task {first['task']!r} has an answer of "
            f"{first['tokens']} tokens; an answer has at least one"
        )
    return rows


def _codes(column: pa.ChunkedArray) -> tuple[list[str], Ints]:
    """The column's values in the order of their first row, and each row's place among them."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Grid:
    """All tasks, methods and seeds, and the checks that name a cell of theirs."""

    methods: list[str]
    seeds: list[int]
    tasks: list[str]
    examples: list[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.tasks), len(self.methods), len(self.seeds)

    def check_none_is_missing(self, sizes: Ints) -> None:
        empty = np.flatnonzero(sizes == 0)
        if not len(empty):
            return
        task, method, seed = (int(i) for i in np.unravel_index(empty[0], self.shape))
        raise ValueError(
            f"{self.methods[method]}, seed {self.seeds[seed]} has no rows of task "
            f"{self.tasks[task]!r}; {len(empty)} of {len(sizes)} cells are missing. A comparison "
            "needs every method with every seed on every task: run the missing ones."
        )

    def task(self, rows: pa.Table, cells: list[Ints], example: Ints, place: int) -> TaskRows:
        """One task's rows; cells: where they are, for each method and seed."""
        tokens = rows["tokens"].to_numpy()
        name = self.tasks[place]
        self.check_alike(name, [example[c] for c in cells], [tokens[c] for c in cells])
        index = np.stack(cells).reshape(len(self.methods), len(self.seeds), -1)
        return TaskRows(
            name,
            [self.examples[e] for e in example[cells[0]]],
            tokens[cells[0]].astype(np.float64),
            rows["nll"].to_numpy()[index],
            rows["correct"].to_numpy().astype(np.float64)[index],
        )

    def check_alike(self, task: str, examples: list[Ints], tokens: list[Ints]) -> None:
        """Every method and seed has the same examples, once each, with the same answers."""
        first = f"{self.methods[0]}, seed {self.seeds[0]}"
        if len(examples[0]) < 2:
            raise ValueError(f"task {task!r} has 1 example; an interval needs two")
        for place, (found, lengths) in enumerate(zip(examples, tokens, strict=True)):
            method, seed = divmod(place, len(self.seeds))
            who = f"{self.methods[method]}, seed {self.seeds[seed]}, task {task!r}"
            twice = found[1:][found[1:] == found[:-1]]
            if len(twice):
                raise ValueError(f"{who} has the example {self.examples[twice[0]]!r} twice")
            if not np.array_equal(found, examples[0]):
                differ = np.setxor1d(found, examples[0])
                raise ValueError(
                    f"{who} has {len(found)} examples and {first} has {len(examples[0])}; "
                    f"{self._some(differ)} only one of the two. Score the same rows in every run."
                )
            if not np.array_equal(lengths, tokens[0]):
                other = found[lengths != tokens[0]]
                raise ValueError(
                    f"{who} has answers of another length than {first}: {self._some(other)} "
                    "differ. Score the same rows with the same tokenizer in every run."
                )

    def _some(self, examples: Iterable[int]) -> str:
        names = [self.examples[e] for e in examples]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(map(repr, names[:3])) + more
