"""A discovery on the disk, whole or not at all: `discovery.json` is written last.

DIR/discovery.json               what was found, see result.py
DIR/assignments.parquet          every row: source, task, cluster (its place in discovery.json's
                                 clusters, from 0; -1: in none), cluster_name (null: in none),
                                 similarity (cosine to the centre), key (of the question)
DIR/branch_selector.safetensors  what sends a new prompt to its cluster
DIR/discovery.html               the same for the eye
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from manylora.adapter.selector import SELECTOR_FILE, BranchSelector
from manylora.corpus.layouts import CorpusError
from manylora.discovery.discover import Documents, Found
from manylora.discovery.result import ASSIGNMENTS_FILE, DISCOVERY_FILE
from manylora.report.discovery import write_discovery_page
from manylora.training.checkpoints import (
    make_writable,
    new_partial,
    partials,
    publish_files,
    sweep,
)

PAGE_FILE = "discovery.html"
_FILES = {DISCOVERY_FILE, ASSIGNMENTS_FILE, PAGE_FILE, SELECTOR_FILE}

Keys = npt.NDArray[np.uint64]


def write_discovery(
    found: Found,
    documents: Documents,
    keys: Keys,
    folder: Path,
    selector: BranchSelector | None = None,
) -> None:
    """Write what was found into a folder, in the place of an earlier discovery in it.

    documents, keys: those that were discovered, in the same order. selector: to be kept beside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = new_partial(folder / "discovery")
    text = found.discovery.model_dump_json(indent=1)
    (partial / DISCOVERY_FILE).write_text(text + "\n", encoding="utf-8")
    pq.write_table(_table(found, documents, keys), partial / ASSIGNMENTS_FILE)
    write_discovery_page(found.discovery, partial / PAGE_FILE)
    if selector is not None:
        selector.save(partial / SELECTOR_FILE)
    for name in (DISCOVERY_FILE, SELECTOR_FILE):
        (folder / name).unlink(missing_ok=True)
    publish_files(partial, folder, last=DISCOVERY_FILE)


def _table(found: Found, documents: Documents, keys: Keys) -> pa.Table:
    names = pa.array(found.discovery.names, pa.string())
    return pa.table(
        {
            "source": pa.array(documents.sources, pa.string()),
            "task": pa.array(documents.tasks, pa.string()),
            "cluster": pa.array(found.labels, pa.int32()),
            "cluster_name": names.take(pa.array(found.labels, mask=found.labels < 0)),
            "similarity": pa.array(found.similarity, pa.float32()),
            "key": pa.array(keys, pa.uint64()),
        }
    )


@dataclass(frozen=True)
class Assignments:
    """The cluster of each question that was discovered.

    keys: sorted, each once; clusters: the cluster of each, -1 for none. Rows that ask the same but
    for case and spacing have one key, and so the cluster of the first of them.
    """

    folder: Path
    keys: Keys
    clusters: npt.NDArray[np.int32]

    def places(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Where each key is in `keys`; -1 where it is not."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)

    def cluster_of(self, keys: Keys) -> npt.NDArray[np.int32]:
        """The cluster of each row by its question's key; CorpusError when one was not discovered.

        What it is in discovery.json's clusters is its place there, from 0; -1 is none of them.
        """
        places = self.places(keys)
        if missing := int((places < 0).sum()):
            raise CorpusError(
                f"{missing:,} of {len(keys):,} rows are not in {self.folder / ASSIGNMENTS_FILE}: "
                "they have been added or changed since. Discover the data as they are now with "
                "`manylora discover DATA --output NEW_FOLDER`."
            )
        return self.clusters[places]


def read_assignments(folder: Path) -> Assignments:
    """The clusters of the rows that an earlier `manylora discover --output FOLDER` read.

    Raises FileNotFoundError when the folder holds no whole discovery.
    """
    path = folder / ASSIGNMENTS_FILE
    if not path.is_file() or not (folder / DISCOVERY_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no discovery ({DISCOVERY_FILE} and {ASSIGNMENTS_FILE}); make one with "
            f"`manylora discover DATA --output {folder}`"
        )
    table = pq.read_table(path, columns=["key", "cluster"])
    keys, first = np.unique(table.column("key").to_numpy(), return_index=True)
    clusters = table.column("cluster").to_numpy()[first]
    return Assignments(folder, keys.astype(np.uint64), clusters.astype(np.int32))


@contextmanager
def empty_folder(folder: Path) -> Iterator[None]:
    """Make the folder and see that it can be written and is empty, before anything is computed.

    What a killed process left there is swept; a folder that stays empty is removed again. Raises
    FileExistsError, or OSError when it cannot be written.
    """
    make_writable(folder, f"the folder {folder}", "--output FOLDER")
    names = {path.name for path in folder.iterdir()} - {path.name for path in partials(folder)}
    if DISCOVERY_FILE in names or names - _FILES:
        held = "holds a discovery already" if DISCOVERY_FILE in names else "is not empty"
        raise FileExistsError(
            f"the folder {folder} {held}; choose another with --output FOLDER, or remove it"
        )
    sweep(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty: the discovery is in it
            folder.rmdir()
