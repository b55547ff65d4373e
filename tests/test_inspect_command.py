"""`manylora inspect` on real runs of a tiny model: what it writes, keeps and refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from manylora.inspect import inspect
from manylora.inspect.command import inspect_runs, lines_of
from manylora.inspect.frames import COLUMNS
from manylora.inspect.full_update import save
from manylora.inspect.gather import Options, from_files, names_of
from manylora.inspect.kept import read_kept, write_kept
from manylora.recipe import parse_recipe
from manylora.report.page import write_report
from manylora.train import train
from test_cli import command
from test_report import Outline
from tiny import save_tiny_model, write_tasks

OF_A_ROUTED_RUN = {"singular_values", "spectra", "subspaces", "projection", "initialisation"}
OF_A_ROUTED_RUN |= {"likeness", "usage", "entropy", "information", "tokens", "training"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A token-routed run, and one with a branch for each task, on the same data."""
    folder = tmp_path_factory.mktemp("runs")
    model, data = save_tiny_model(folder / "model"), write_tasks(folder / "tasks", rows=40)
    adapters: dict[str, dict[str, Any]] = {
        "routed": {"method": "hydralora", "r": 4},
        "chosen": {"method": "branch_per_cluster", "r": 4},
    }
    for name, adapter in adapters.items():
        steps = {"max_steps": 6, "learning_rate": 0.02, "warmup": 0, "log_every": 2, "workers": 0}
        recipe = {"model": str(model), "data": str(data), "holdout": 0.2, "adapter": adapter}
        recipe |= {"train": {**steps, "precision": "fp32"}, "evaluate": {"rows_per_task": 6}}
        train(parse_recipe({**recipe, "output": str(folder / name)}))
    return {name: folder / name for name in adapters}


@pytest.fixture
def run(trained: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(trained["routed"], tmp_path / "routed")
    return tmp_path / "routed"


def sections(page: Path) -> list[str]:
    return Outline(page.read_text(encoding="utf-8")).ids


def test_report_of_a_trained_run_shows_what_its_files_tell(run: Path) -> None:
    shown = sections(write_report(run))
    assert {"spectra", "routing", "training", "missing"} <= set(shown)
    assert "projection" not in shown
    missing = from_files(run).missing
    assert missing["projection"] == f"`manylora inspect {run}` adds it"
    assert "--interference" in missing["interference"]


def test_inspecting_a_run_adds_the_rest_to_its_report(run: Path) -> None:
    done = command("inspect", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(run / "report.html")
    shown = sections(run / "report.html")
    assert {"subspaces", "projection", "spectra", "routing"} <= set(shown)
    assert len(shown) == len(set(shown))


def test_what_was_computed_is_shown_again_by_a_report_that_is_written_again(run: Path) -> None:
    found, page = inspect_runs([run], None, Options(), Console(quiet=True))
    before = sections(page)
    assert sections(write_report(run)) == before
    pd.testing.assert_frame_equal(read_kept(run)["projection"], found.frames["projection"])


def test_what_was_computed_from_other_weights_is_not_shown(run: Path, trained: Any) -> None:
    write_kept(run, {"spectra": from_files(run).frames["spectra"]})
    assert set(read_kept(run)) == {"spectra"}
    other = trained["chosen"] / "adapter_model.safetensors"
    shutil.copy(other, run / "adapter_model.safetensors")
    assert read_kept(run) == {}


def test_a_damaged_table_is_named_with_what_to_do(run: Path) -> None:
    write_kept(run, {"spectra": from_files(run).frames["spectra"]})
    (run / "inspection" / "spectra.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"inspection: cannot be read .*delete the folder"):
        write_report(run)


def test_python_gives_the_tables_of_a_run(trained: dict[str, Path]) -> None:
    found = inspect(trained["routed"])
    assert set(found.frames) == OF_A_ROUTED_RUN
    assert set(found.missing) == {"interference", "transfer"}
    for name, frame in found.frames.items():
        assert set(COLUMNS[name]) <= set(frame.columns)
    assert set(found.frames["usage"]["run"]) == {"routed"}
    assert {"", *found.frames["spectra"]["layer"]} >= set(found.frames["tokens"]["layer"])


def test_a_run_with_a_selector_shows_its_choices(trained: dict[str, Path]) -> None:
    found = inspect(trained["chosen"])
    assert found.frames["confusion"]["rows"].sum() == len(found.frames["distances"]) == 18


def test_runs_are_set_side_by_side_in_a_page_of_their_own(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("inspect", *trained.values())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "inspect.html"
    text = (tmp_path / "inspect.html").read_text()
    assert "<h1>Inside 2 runs</h1>" in text and "hydralora on model" in text
    assert {"spectra", "projection", "routing", "selector", "training"} <= set(
        sections(Path("inspect.html"))
    )
    assert "A at the start by run" in text and "A, what changed by run" in text
    assert not (trained["routed"] / "inspection").exists()


def test_gradients_between_tasks_are_measured_when_asked_for(run: Path, tmp_path: Path) -> None:
    done = command("inspect", run, "--interference", "--rows", "2")
    assert done.returncode == 0, done.stderr
    assert "interference" in sections(run / "report.html")
    kept = read_kept(run)["interference"]
    assert set(kept["task"]) == set(kept["other"]) and len(set(kept["task"])) == 3
    # A later look at it shows them without measuring them again.
    page = tmp_path / "page.html"
    assert command("inspect", run, "--output", page).returncode == 0
    assert "interference" in sections(page)


def test_a_task_is_left_out_when_asked_for(run: Path) -> None:
    done = command("inspect", run, "--leave-out", "copy")
    assert done.returncode == 0, done.stderr
    assert "transfer" in sections(run / "report.html")
    kept = read_kept(run)["transfer"]
    assert set(kept["left_out"]) == {"copy"} and {"colour", "parity"} <= set(kept["task"])
    wrong = command("inspect", run, "--leave-out", "chess")
    assert wrong.returncode == 1 and "chess" in wrong.stderr and "colour" in wrong.stderr


def test_a_plain_lora_folder_has_a_page_where_it_is_asked_for(
    tmp_path: Path, tiny_folder: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    done = command("inspect", tmp_path / "lora", "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "page.html").read_text()
    assert "whole: the update is zero, as before training." in said
    assert "metrics.jsonl is missing" in said


def test_a_full_fine_tuning_is_set_beside_a_run(
    trained: dict[str, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    """Its update is one direction in every layer, and the largest value has all of the sum."""
    after = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    for parameter in after.parameters():
        parameter.data += 0.01  # a matrix of one number has rank 1
    save(tmp_path / "full", before, after)
    found = inspect(trained["routed"], tmp_path / "full")
    spectra = found.frames["spectra"]
    assert spectra[spectra["run"] == "full"]["top1"].to_numpy() == pytest.approx(1, abs=1e-3)
    phi = found.frames["subspaces"]
    assert set(phi["right"]) == {"full: whole"}
    assert "routed: branch 0" in set(phi["left"])
    assert set(found.frames["projection"]["run"]) == {"routed"}


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_an_update_is_refused_in_one_message(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    done = command("inspect", tmp_path / name, "--output", tmp_path / "page.html")
    assert done.returncode == 1
    assert str(tmp_path / name) in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_rows_without_what_they_are_for_are_refused(run: Path) -> None:
    done = command("inspect", run, "--rows", "4")
    assert done.returncode == 1 and "--interference" in done.stderr


def test_a_run_given_twice_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="given twice"):
        inspect(run, run)


def test_a_look_at_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no run was given"):
        inspect()


def test_runs_of_one_name_are_told_apart_by_the_folders_above() -> None:
    assert names_of([Path("/a/one/run"), Path("/a/two/run")]) == ["one/run", "two/run"]
    assert names_of([Path("/a/one/run"), Path("/a/one/other")]) == ["run", "other"]


def test_the_command_says_what_stands_out(trained: dict[str, Path]) -> None:
    found = inspect(trained["routed"])
    lines = lines_of(found, Path("page.html"))
    assert lines[-1] == "page.html"
    assert [line for line in lines[:-1] if line.startswith("routed: ")] == [
        f"routed: {finding.text}" for finding in found.findings["routed"]
    ]
