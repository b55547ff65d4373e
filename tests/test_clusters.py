"""Clusters of prompts as a run's tasks, and as its number of branches: `tasks` and `auto`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from clustered import TASKS, Make, quiet, rows_of, said, settled, write
from manylora.corpus import DrawOrder, dataset_of
from manylora.discovery.options import DiscoveryOptions
from manylora.discovery.result import read_discovery
from manylora.doctor import examine
from manylora.recipe import RecipeError, load_recipe
from manylora.show import show_data
from manylora.training import clusters, prepare

pytest_plugins = ("clustered",)


def task_of(example: Any) -> str:
    """The made-up task that an example is of."""
    return str(example.output)


def test_rows_of_one_file_are_filed_under_what_they_ask(make: Make) -> None:
    recipe = make(validation=0.2)
    corpus = settled(recipe).corpus
    assert len(corpus.tasks) == len(TASKS)
    for split in (corpus.train, corpus.validation, corpus.test):
        assert list(split) == corpus.tasks
        for name, rows in split.items():
            assert len({task_of(row) for row in rows}) == 1, name
            assert {row.task for row in rows} == {name}
            assert {row.task for row in rows[:2]} == {row.task for row in rows.spread(2)} == {name}
    sizes = [len(rows) for rows in corpus.train.values()]
    assert sizes == sorted(sizes, reverse=True)  # cluster 1 is the largest
    every = [
        row.source
        for part in (corpus.train, corpus.validation, corpus.test)
        for rows in part.values()
        for row in rows
    ]
    assert len(every) == len(set(every)) == sum(rows for rows, _, _ in TASKS.values())


def test_held_out_rows_are_not_learned_from(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import manylora.discovery.corpus as module

    learned: list[str] = []
    whole = module.discover

    def discover(documents: Any, *args: Any) -> Any:
        learned.extend(documents.sources)
        return whole(documents, *args)

    monkeypatch.setattr(module, "discover", discover)
    recipe = make(validation=0.2)
    settled(recipe)
    trained = recipe.load_corpus().train
    assert sorted(learned) == sorted(row.source for rows in trained.values() for row in rows)


def test_clusters_are_drawn_equally_often_where_the_mixture_is_balanced(make: Make) -> None:
    recipe = make(mixture="balanced")
    console = quiet()
    show_data(recipe, console, console)
    names = settled(recipe).corpus.tasks
    for name in names:
        assert name in said(console)
    assert said(console).count("33.3%") == len(TASKS)
    rows = settled(recipe).corpus.train
    order = DrawOrder({name: len(own) for name, own in rows.items()}, recipe.mixture, 0)
    flat = [name for name, own in rows.items() for _ in own]
    drawn = Counter(flat[int(place)] for place in order.epoch(0))
    assert max(drawn.values()) - min(drawn.values()) <= 1


def test_clusters_and_auto_are_of_one_discovery(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    whole = clusters._discovered
    monkeypatch.setattr(
        clusters, "_discovered", lambda *args: (looked.append(args), whole(*args))[1]
    )
    done = settled(make(adapter={"num_branches": "auto"}))
    assert len(looked) == 1
    assert done.recipe.num_branches == len(done.corpus.tasks) == len(TASKS)


def test_auto_is_a_branch_for_each_task_with_a_one_hot_gate(make: Make) -> None:
    recipe = make(tasks="named", adapter={"method": "branch_per_cluster", "num_branches": "auto"})
    assert recipe.num_branches is None
    assert settled(recipe).folder is None


def test_a_folder_is_the_same_from_anywhere(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert make(tasks=folder.name).resolved().tasks == str(folder)
    assert make().resolved().tasks == "discovered"


def test_a_row_that_the_folder_does_not_know_is_named(make: Make, folder: Path, data: Path) -> None:
    write(data, [*rows_of("sum"), {"instruction": "New?", "input": "a new row", "output": "no"}])
    with pytest.raises(ValueError, match=r"all\.jsonl:49: not in .*assignments.*discover DATA"):
        settled(make(tasks=str(folder)))


def test_rows_that_only_a_part_of_the_folder_has_are_tasks_of_that_part(
    make: Make, folder: Path, data: Path
) -> None:
    write(data, rows_of("colour"))
    corpus = settled(make(tasks=str(folder))).corpus
    assert corpus.tasks == [read_discovery(folder).names[1]]


def test_rows_with_nothing_to_read_are_left_out_and_counted(make: Make, data: Path) -> None:
    odd = [{"instruction": "?!" + "." * i, "input": "", "output": "no"} for i in range(4)]
    write(data, [*odd, *(row for task in TASKS for row in rows_of(task))])
    console = quiet()
    corpus = settled(make(), console).corpus
    assert "4 of 100 rows are in no cluster and are left out" in said(console)
    rows = [row for part in (corpus.train, corpus.test) for own in part.values() for row in own]
    assert len(rows) == 96
    assert "?" not in {row.prompt[0]["content"][0] for row in rows}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["discovery.clustres=3"], "unknown key 'discovery.clustres'; did you mean 'clusters'?"),
        (["discovery.features=words"], "discovery.features"),
        (["adapter.num_branches=many"], "num_branches"),
        (["adapter.num_branches=auto", "adapter.method=lora"], "method='lora' fixes their number"),
        (
            ["adapter.num_branches=auto", "adapter.method=multilora", "adapter.branch_ranks=[2,4]"],
            "branch_ranks fixes their number",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, ["data=d", *changes])
    assert message in str(caught.value)


def test_a_word_that_is_none_is_not_taken_for_a_folder(make: Make) -> None:
    with pytest.raises(RecipeError, match="tasks='discoverd' is no folder; tasks is named, disc"):
        settled(make(tasks="discoverd"))


def test_the_same_recipe_finds_the_same_clusters(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = settled(make())
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "another"))
    second = settled(make())
    assert first.folder != second.folder and first.found is not None and second.found is not None
    assert first.found.model_dump(exclude={"seconds"}) == second.found.model_dump(
        exclude={"seconds"}
    )
    one, other = (
        {name: [row.source for row in rows] for name, rows in done.corpus.train.items()}
        for done in (first, second)
    )
    assert one == other


def test_what_was_found_is_found_in_the_cache_until_anything_changes(
    make: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = settled(make()).folder
    assert settled(make("elsewhere", adapter={"r": 2})).folder == first
    others = {
        settled(make(seed=1)).folder,
        settled(make(discovery=DiscoveryOptions(clusters=2).model_dump())).folder,
        settled(make(holdout=0.3)).folder,
    }
    write(data, [row for task in TASKS for row in rows_of(task, 20)])
    others.add(settled(make()).folder)
    assert len(others) == 4 and first not in others


def test_scored_rows_are_of_all_tasks_of_a_cluster(make: Make, tmp_path: Path) -> None:
    """In the order of the files the first ones would be of the first file alone."""
    (tmp_path / "two").mkdir()
    for part in ("one", "two"):
        rows = [{**row, "output": part} for row in rows_of("sum", 60)]
        rows = [{**row, "input": f"{row['input']} {part}"} for row in rows]
        write(tmp_path / "two" / f"{part}.jsonl", rows)
    corpus = settled(make(data=str(tmp_path / "two"), discovery={"clusters": 1})).corpus
    (rows,) = corpus.test.values()
    assert len(rows) == 24 and {row.output for row in rows[:8]} == {"one", "two"}


def test_doctor_looks_for_clusters_and_for_what_is_wrong_with_them(make: Make) -> None:
    findings = {f.text: f.status for f in examine(make(adapter={"num_branches": "auto"}))}
    assert any(text.startswith("3 clusters in ") for text in findings)
    assert any(": 3 task(s), 77 training rows" in text for text in findings)
    wrong = [f for f in examine(make(tasks="nowhere")) if f.status == "problem"]
    assert ["tasks='nowhere' is no folder" in f.text for f in wrong] == [True]


def test_doctor_does_not_load_a_model_to_look(make: Make) -> None:
    recipe = make(discovery={"features": "model"}, model="no-such-owner/no-such-model")
    notes = [f.text for f in examine(recipe) if f.status == "note"]
    assert any("clusters are not looked for" in text for text in notes)


def test_branches_of_a_run_of_clusters_get_their_own_rows_only(make: Make) -> None:
    recipe = make(adapter={"method": "branch_per_cluster"})
    done = prepare.prepare(recipe, quiet())
    dataset = dataset_of(done.train, done.tasks, done.encoder)
    names = list(done.corpus.train)
    for row in dataset:
        text = done.tokenizer.decode(torch.tensor(row["input_ids"]))
        assert TASKS[[*TASKS][row["task_id"]]][1] in text
    assert done.tasks == names


def test_the_base_model_can_read_the_rows(make: Make) -> None:
    done = settled(make(discovery={"features": "model", "clusters": 3}))
    assert done.found is not None and done.found.k == len(done.corpus.tasks) == 3
    assert "mean hidden state" in str(done.found.settings["features"])
