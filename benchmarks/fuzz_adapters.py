"""Mutated adapter folders and checkpoints into loading and import; the counts are kept.

python benchmarks/fuzz_adapters.py --inputs 10000   # of all kinds together, into results/
python benchmarks/fuzz_adapters.py --inputs 500 --only hydralora --seed 7 --no-keep

Each folder is loaded in a child process, so that a crash of a library is seen and counted, and not
only an exception. The folders are made in tests/folder_fuzzing.py, and judged in
tests/folder_check.py: loaded as the file says, or one error that names a file, within ten seconds
and 64 MiB, nothing executed, nothing written.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before PEFT is imported: a folder is never looked up

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from in_children import command, fuzz

from folder_check import CHECKPOINT, KINDS, base_model, check, make_adapter
from folder_fuzzing import mutate
from fuzz_check import ViolationError

OUTCOMES = ("loaded", "refused")


def work(kind: str, start: int, stop: int, seed: int, results: Connection) -> None:
    """Sends (number, outcome, message, seconds) for each folder."""
    with tempfile.TemporaryDirectory() as parent:
        source, base = make_adapter(kind, Path(parent) / "source"), base_model()
        for number in range(start, stop):
            folder = Path(parent) / f"{kind}-{number}"
            change = mutate(source, folder, number, seed)
            began, message = time.perf_counter(), ""
            try:
                outcome = check(folder, base, kind == CHECKPOINT)
                if change == "nothing" and outcome != "loaded":
                    raise ViolationError("a folder without damage was refused")
            except ViolationError as error:
                outcome, message = "violations", f"{change}: {error}"
            results.send((number, outcome, message, time.perf_counter() - began))
            shutil.rmtree(folder)


def main() -> None:
    command(str(__doc__), KINDS, "folders", "fuzz_adapters.json", fuzz_kind)


def fuzz_kind(kind: str, inputs: int, seed: int) -> dict[str, Any]:
    return fuzz(work, kind, inputs, seed, OUTCOMES)


if __name__ == "__main__":
    main()
