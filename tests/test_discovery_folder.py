"""A discovery on the disk: whole or absent, and read back as it was."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from discovered import discovered
from manylora.corpus import CorpusError
from manylora.discovery.discover import Clusters, Documents, Found
from manylora.discovery.folder import empty_folder, read_assignments, write_discovery
from manylora.discovery.result import read_discovery
from manylora.discovery.space import Space, Tfidf
from manylora.training import checkpoints

LABELS = [2, 0, -1, 1, 3, 0]
KEYS = np.array([2**64 - 1, 7, 0, 2**63, 5, 7], dtype=np.uint64)
FILES = {"discovery.json", "assignments.parquet", "discovery.html"}


def found(labels: list[int] = LABELS) -> tuple[Found, Documents]:
    """A discovery of four clusters, and what was put into them."""
    clusters = Clusters(Space(Tfidf(0)), np.zeros((4, 2), dtype=np.float32))
    similarity = np.linspace(0, 1, len(labels), dtype=np.float32)
    documents = Documents(
        [f"text {i}" for i in range(len(labels))],
        ["law" if i % 2 else "code" for i in range(len(labels))],
        [f"rows.jsonl:{i + 1}" for i in range(len(labels))],
    )
    known = Found(discovered(), clusters, np.array(labels, dtype=np.int32), similarity)
    return known, documents


def write(folder: Path, labels: list[int] = LABELS) -> Found:
    known, documents = found(labels)
    write_discovery(known, documents, KEYS[: len(labels)], folder)
    return known


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    known = write(tmp_path / "deep" / "found")
    assert {path.name for path in (tmp_path / "deep" / "found").iterdir()} == FILES
    assert read_discovery(tmp_path / "deep" / "found") == known.discovery


def test_every_row_has_its_cluster(tmp_path: Path) -> None:
    known = write(tmp_path)
    table = pq.read_table(tmp_path / "assignments.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "source": "string",
        "task": "string",
        "cluster": "int32",
        "cluster_name": "string",
        "similarity": "float",
        "key": "uint64",
    }
    rows = table.to_pydict()
    assert rows["source"] == [f"rows.jsonl:{i}" for i in range(1, 7)]
    assert rows["task"] == ["code", "law"] * 3
    assert rows["cluster"] == LABELS
    names = known.discovery.names
    assert rows["cluster_name"] == [None if at < 0 else names[at] for at in LABELS]
    assert rows["similarity"] == known.similarity.tolist()
    assert rows["key"] == KEYS.tolist()


def test_the_cluster_of_a_row_is_found_by_its_key(tmp_path: Path) -> None:
    write(tmp_path)
    asked = np.array([5, 0, 2**63, 7, 2**64 - 1, 7], dtype=np.uint64)
    clusters = read_assignments(tmp_path).cluster_of(asked)
    assert clusters.tolist() == [3, -1, 1, 0, 2, 0]
    assert clusters.dtype == np.int32
    assert read_assignments(tmp_path).cluster_of(asked[:0]).tolist() == []


def test_rows_that_ask_the_same_have_the_cluster_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, [2, 3, -1, 1, 3, 0])
    assert read_assignments(tmp_path).cluster_of(KEYS[[1, 5]]).tolist() == [3, 3]


def test_rows_that_were_not_discovered_are_counted(tmp_path: Path) -> None:
    write(tmp_path)
    unknown = np.array([7, 6, 2**64 - 2, 8], dtype=np.uint64)
    with pytest.raises(CorpusError, match=r"3 of 4 rows are not in .*assignments.parquet.*discov"):
        read_assignments(tmp_path).cluster_of(unknown)


def test_a_folder_without_a_discovery_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="manylora discover DATA --output"):
        read_assignments(tmp_path)


def test_a_new_discovery_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, [1, 1])
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert read_assignments(tmp_path).clusters.tolist() == [1, 1]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("kill", range(len(FILES)))
def test_a_kill_leaves_no_half_discovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: int, earlier: bool
) -> None:
    """Killed at the kill-th of the files that get their names."""
    if earlier:
        write(tmp_path, [1, 1])
    moved: list[Path] = []
    replace = os.replace

    def until_killed(source: Path, target: Path) -> None:
        if len(moved) == kill:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "replace", until_killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_assignments(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_discovery(tmp_path)
    with empty_folder(tmp_path):  # what is left does not stand in the way
        write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert read_assignments(tmp_path).cluster_of(KEYS).tolist() == LABELS


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; choose another with --output"):
        empty_folder(tmp_path).__enter__()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    write(tmp_path / "found")
    with pytest.raises(FileExistsError, match="holds a discovery already"):
        empty_folder(tmp_path / "found").__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        empty_folder(tmp_path / "file").__enter__()


def test_a_folder_that_stays_empty_is_removed_again(tmp_path: Path) -> None:
    with pytest.raises(CorpusError), empty_folder(tmp_path / "found"):
        raise CorpusError("no rows")
    assert not (tmp_path / "found").exists()
