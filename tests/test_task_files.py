"""Which files are tasks, and data sets of the hub, which are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manylora.corpus.folders import files_not_read, task_files
from manylora.corpus.hub import hub_splits, parse_hub_name, read_hub
from manylora.corpus.layouts import CorpusError

ROWS = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(5)]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_a_folder_holds_a_task_a_file_or_sub_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.jsonl", "a.CSV", "c.json.gz", ".hidden.jsonl", "README.md", "manifest.json")
    touch(tmp_path, "big-00000-of-00002.parquet", "big-00001-of-00002.parquet")
    touch(tmp_path, "sub/one.jsonl", "sub/more/two.json", "sub/dataset_info.json", "v1.2.jsonl")
    tasks = task_files(tmp_path)
    assert list(tasks) == ["a", "b", "big", "c", "sub", "v1.2"]
    assert [file.name for file in tasks["big"]] == [
        "big-00000-of-00002.parquet",
        "big-00001-of-00002.parquet",
    ]
    assert [file.name for file in tasks["sub"]] == ["two.json", "one.jsonl"]
    assert [file.name for file in files_not_read(tmp_path)] == [
        "README.md",
        "manifest.json",
        "dataset_info.json",
    ]
    assert task_files(tmp_path / "b.jsonl") == {"b": [tmp_path / "b.jsonl"]}


WRONG_FOLDERS = {
    (): "no file of rows here .*found nothing",
    ("notes.txt",): r"found notes\.txt",
    ("a.jsonl", "A.csv"): "the same task name as",
    ("a.jsonl", "a.csv"): "the same task name as",
    ("a.jsonl", "a/b.jsonl"): "the same task name as the folder a/",
    ("a-00000-of-00003.jsonl", "a-00002-of-00003.jsonl"): "2 of the 3 shards are there",
    ("train.jsonl", "test.jsonl"): "splits of one data set by their names, not tasks",
    ("data/train.jsonl", "data/test.jsonl", "b.json"): "rows to test on would be trained on",
}


@pytest.mark.parametrize("names", WRONG_FOLDERS, ids=range(len(WRONG_FOLDERS)))
def test_a_folder_that_is_not_clear_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(CorpusError, match=WRONG_FOLDERS[names]):
        task_files(tmp_path)


def test_a_hub_data_set_is_read_like_a_file(tmp_path: Path) -> None:
    lines = [json.dumps({**row, "id": 1}) + "\n" for row in ROWS]
    bad = json.dumps({**ROWS[0], "output": "", "id": 1}) + "\n"
    (tmp_path / "train.jsonl").write_text("".join([*lines, bad]))
    (tmp_path / "test.jsonl").write_text(lines[0])
    unread: set[str] = set()
    found = list(read_hub(str(tmp_path), unread=unread))
    assert [item.output for item in found[:5]] == ["a0", "a1", "a2", "a3", "a4"]  # type: ignore[union-attr]
    assert found[0].source == f"{tmp_path}:train:1"  # type: ignore[union-attr]
    assert found[0].task == tmp_path.name and unread == {"id"}  # type: ignore[union-attr]
    assert str(found[5]).startswith(f'{tmp_path}:train:6: field "output" is empty')
    assert hub_splits(str(tmp_path)) == ["train", "test"]


def test_a_hub_name_may_have_a_configuration_and_a_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def unreachable(*args: object, **options: object) -> None:
        asked.append((args, options))
        raise ConnectionError("no route to host")

    monkeypatch.setattr("manylora.corpus.hub.datasets.load_dataset", unreachable)
    with pytest.raises(CorpusError, match=r"owner/name/main@v1:test: .*no route.*HF_HUB_OFFLINE"):
        list(read_hub("owner/name/main@v1", split="test"))
    assert asked == [
        (("owner/name", "main"), {"split": "test", "revision": "v1", "streaming": True})
    ]
    with pytest.raises(CorpusError, match="no data set on the hub"):
        parse_hub_name("just-a-name")
