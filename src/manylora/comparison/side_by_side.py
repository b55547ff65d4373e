"""Cells side by side: processes that each run cell after cell, as many as the memory has room for.

A GPU of the host that torch sees has its own processes, which see no other; they take the next cell
as they become free. Each reads the rows once, from the cache, and lives as long as the comparison.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from joblib.externals.loky import ProcessPoolExecutor
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from manylora.comparison.cell import Cell, run_cell
from manylora.comparison.ground import Ground, prepare_ground
from manylora.comparison.store import CellStore, key_of
from manylora.recipe import Choice, Recipe

_MOST_ON_A_GPU = 8
_CONTEXT_BYTES = 0.6e9  # of a process on a GPU, beside its tensors


def at_once(summary: dict[str, Any]) -> int:
    """How many runs like the given one fit on a GPU; on a CPU one, for it uses all cores."""
    if not torch.cuda.is_available():
        return 1
    room = torch.cuda.get_device_properties(0).total_memory * 0.85
    each = summary["peak_memory_bytes"] * 1.15 + _CONTEXT_BYTES
    return max(1, min(_MOST_ON_A_GPU, int(room // each)))


def gpus() -> list[str]:
    """The GPUs that torch sees, in CUDA_VISIBLE_DEVICES' words; one empty word without any."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else list(map(str, range(count)))
    return names[:count] or [""]


class SideBySide:
    """Processes that run cells and keep them in the store; a context that they live in.

    parallel: runs at once on a GPU, or on the CPU where there is none.
    """

    def __init__(self, ground: Ground, store: CellStore, parallel: int, energy: bool) -> None:
        self._processes = ExitStack()
        pools = [_pool(gpu, ground, store, parallel, energy) for gpu in gpus()]
        for pool in pools:
            self._processes.enter_context(pool)
        self._free = pools * parallel
        self._running: dict[Future[None], tuple[Cell, Any]] = {}

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *error: Any) -> None:
        self._processes.__exit__(*error)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def free(self) -> int:
        """How many more cells can be started."""
        return len(self._free)

    def start(self, cell: Cell) -> None:
        pool = self._free.pop(0)
        self._running[pool.submit(_run_there, cell)] = (cell, pool)

    def finished(self) -> list[Cell]:
        """Waits until a cell is finished, and returns those that are; raises what one raised."""
        cells = []
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            cell, pool = self._running.pop(future)
            future.result()
            self._free.append(pool)
            cells.append(cell)
        return cells


@dataclass(frozen=True)
class _Process:
    """What a process that runs cells keeps from one to the next."""

    ground: Ground
    store: CellStore
    parallel: int
    energy: bool


_here: list[_Process] = []


def _pool(gpu: str, ground: Ground, store: CellStore, parallel: int, energy: bool) -> Any:
    # Its environment is set before it imports torch, which reads these once.
    threads = max(1, (os.cpu_count() or 1) // (parallel * len(gpus())))
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return ProcessPoolExecutor(
        parallel,
        initializer=_begin,
        initargs=(
            *(ground.recipe, ground.choice, ground.unseen_data),
            *(store.folder.parent, parallel, energy),
        ),
        env=environment,
    )


def _begin(
    recipe: Recipe,
    choice: Choice,
    unseen: Path | None,
    folder: Path,
    parallel: int,
    energy: bool,
) -> None:
    # loky leaves its own way of starting processes here, which torch's data loader does not know.
    multiprocessing.set_start_method(None, force=True)
    disable_progress_bar()
    ground = prepare_ground(recipe, Console(quiet=True), choice, unseen)
    _here.append(_Process(ground, CellStore(folder), parallel, energy))


def _run_there(cell: Cell) -> None:
    own = _here[0]
    key = key_of(own.ground, cell)
    beside = own.store.beside(key)
    own.store.write(key, *run_cell(own.ground, cell, key, own.parallel, own.energy, beside))
