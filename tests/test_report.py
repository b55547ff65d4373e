"""The report page: its numbers, its escaping, its self-containment, and its errors."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from manylora.report.page import duration, verdict, write_report
from manylora.report.plots import Axis, csv_link, points_a_bin, thin
from tiny import attach, tiny_llama

EVIL = "<script>alert(1)</script>"
TASKS = ["legal_cuad", "finance_headlines", EVIL]


def scores() -> dict[str, Any]:
    return {
        "tasks": {
            "legal_cuad": {
                "n": 40,
                "before": {"nll": [2.512, 2.3, 2.7], "token_f1": [0.251, 0.2, 0.3]},
                "after": {"nll": [1.234, 1.1, 1.4], "token_f1": [0.26, 0.21, 0.31]},
            },
            "finance_headlines": {
                "n": 61,
                "before": {"nll": [3.0, 2.9, 3.1], "choice_accuracy": [0.49, 0.37, 0.61]},
                "after": {"nll": [3.3, 3.05, 3.5], "choice_accuracy": [0.754, 0.63, 0.85]},
            },
            EVIL: {"n": 5, "before": {"nll": [1.0, 0.5, 1.5]}, "after": {"nll": [0.9, 0.4, 1.4]}},
        }
    }


def summary() -> dict[str, Any]:
    return {
        "method": "hydralora",
        "model": "smollm2-135m-instruct",
        "trainable_parameters": 1_345_678,
        "total_parameters": 135_860_698,
        "train_rows": 3000,
        "train_tokens": 410_222,
        "steps": 400,
        "train_seconds": 3725.2,
        "evaluate_seconds": 47.9,
        "peak_memory_bytes": 3 * 2**30,
        "device": "CPU, 2 cores",
        "versions": {"torch": "2.13.0", "bitsandbytes": None},
        "mixture": [
            {"task": t, "rows": 1000, "tokens": 136_740, "answer_tokens": 9001, "share": 1 / 3}
            for t in TASKS
        ],
    }


def logged_step(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "seconds": step * 9.0,
        "loss": 1 + 20 / (step + 10),
        "learning_rate": 1e-3 * (1 - step / 500),
        "grad_norm": 0.8,
        "tokens": 5120,
        "tokens_per_second": 410.0 + step % 7,
        "tasks": {t: {"loss": 1 + i + 10 / (step + 9), "tokens": 60} for i, t in enumerate(TASKS)},
    }


def routing() -> dict[str, Any]:
    layers = [f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")]
    weights = {TASKS[0]: [0.6, 0.3, 0.1], TASKS[1]: [0.2, 0.2, 0.6], EVIL: [1.0, 0.0, 0.0]}
    return {
        "branches": 3,
        "layers": layers,
        "tasks": {task: [row] * len(layers) for task, row in weights.items()},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path, steps=40)
    return tmp_path


def write_run(folder: Path, steps: int) -> None:
    (folder / "recipe.yaml").write_text("data: tasks\ntrain:\n  learning_rate: 0.001\n")
    config = {"method": "hydralora", "num_branches": 3, "r": 2}
    attach(tiny_llama(), target_modules=["q_proj", "v_proj"], **config).save_pretrained(folder)
    lines = [json.dumps(logged_step(10 * (i + 1))) for i in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "scores.json").write_text(json.dumps(scores()))
    (folder / "summary.json").write_text(json.dumps(summary()))
    (folder / "routing.json").write_text(json.dumps(routing()))
    export = {"path": "export/legal", "kind": "plain LoRA", "exact": False}
    export |= {"max_logit_difference": 0.0123, "note": "mean routing weights"}
    (folder / "exports.json").write_text(json.dumps([export]))


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Checks that elements nest, and collects addresses, section ids and start tags."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.addresses += [value or "" for key, value in attrs if key in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_shows_the_numbers_of_the_run(run: Path) -> None:
    text = page(run)
    shown = ["hydralora on smollm2-135m-instruct", "1,345,678 (0.99%)", "1 h 2 min", "3.00 GiB"]
    shown += ["CPU, 2 cores", "2.512", "1.234", "1.100–1.400", "0.754", "33.3 %", "136,740"]
    shown += ["plain LoRA", "0.0123", "learning_rate: 0.001", "2.13.0"]
    assert [part for part in shown if part not in text] == []


def test_page_is_well_formed_small_and_loads_nothing(run: Path) -> None:
    text = page(run)
    outline = Outline(text)
    sections = ["scores", "training", "mixture", "spectra", "routing", "exports", "recipe"]
    assert outline.ids == ["findings", *sections, "missing"]
    links = [a.removeprefix("#") for a in outline.addresses if a.startswith("#")]
    assert links == outline.ids
    data = [a for a in outline.addresses if not a.startswith("#")]
    assert data and all(a.startswith("data:text/csv") for a in data)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    assert text.lstrip().startswith("<!DOCTYPE html>")


def test_task_names_are_escaped_everywhere(run: Path) -> None:
    text = page(run)
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5


def test_only_intervals_beyond_the_before_mean_are_marked(run: Path) -> None:
    text = page(run)
    assert '<b class="better">1.234 ▲</b>' in text
    assert '<b class="worse">3.300 ▼</b>' in text
    assert '<b class="better">0.754 ▲</b>' in text
    assert '<b class="">0.260</b>' in text
    assert '<b class="">0.900</b>' in text


@pytest.mark.parametrize(
    ("metric", "after", "expected"),
    [
        ("nll", (0.8, 0.7, 0.9), "better"),
        ("nll", (0.8, 0.6, 1.0), ""),
        ("nll", (1.3, 1.1, 1.5), "worse"),
        ("exact_match", (1.3, 1.1, 1.5), "better"),
        ("exact_match", (1.3, 1.0, 1.5), ""),
        ("exact_match", (0.8, 0.7, 0.9), "worse"),
        ("exact_match", (float("nan"),) * 3, ""),
    ],
)
def test_verdict(metric: str, after: tuple[float, float, float], expected: str) -> None:
    assert verdict(metric, (1.0, 0.5, 1.5), after) == expected


def test_verdict_needs_both_sides() -> None:
    assert verdict("nll", None, (1.0, 1.0, 1.0)) == ""
    assert verdict("nll", (1.0, 1.0, 1.0), None) == ""


def test_plots_carry_their_data(run: Path) -> None:
    addresses = [a for a in Outline(page(run)).addresses if not a.startswith("#")]
    tables = [unquote(a.split(",", 1)[1]) for a in addresses]
    by_header = {table.splitlines()[0]: table.splitlines()[1:] for table in tables}
    pace = by_header["step,loss,learning_rate,tokens_per_second"]
    assert len(pace) == 40 and pace[0] == "10,2,0.00098,413"
    assert f"{EVIL},10,3.52632" in by_header["task,step,loss"]
    usage = by_header["run,layer,task,branch_0,branch_1,branch_2"]
    layer = f"{run.name},model.layers.0.self_attn.q_proj"
    assert len(usage) == 4 * len(TASKS)
    assert f"{layer},legal_cuad,0.6,0.3,0.1" in usage and f"{layer},{EVIL},1,0,0" in usage


@pytest.mark.parametrize(("name", "section"), [("routing", "routing"), ("exports", "exports")])
def test_section_of_a_missing_optional_file_is_absent(run: Path, name: str, section: str) -> None:
    (run / f"{name}.json").unlink()
    assert section not in Outline(page(run)).ids


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "scores.json", "summary.json"])
def test_missing_required_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing.*`manylora train`"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_broken_line_is_named(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 41')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:41.*`manylora train`"):
        write_report(run)


def test_routing_of_the_wrong_shape_is_named(run: Path) -> None:
    broken = routing()
    broken["tasks"]["legal_cuad"][0] = [1.0]
    (run / "routing.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"legal_cuad.*4 layers of 3 weights.*\[1, 3\]"):
        write_report(run)


def test_run_without_logged_steps_has_a_page(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    assert "no logged step" in page(run)


def test_losses_that_are_not_finite_are_counted_not_drawn(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    step = json.loads(lines[0]) | {"loss": float("nan")}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(step), *lines[1:]]))
    text = page(run)
    assert "1 points that are not finite are left out" in text
    assert not re.search(r'points="[^"]*nan', text)


def test_long_run_of_many_tasks_stays_under_a_megabyte(run: Path) -> None:
    names = [f"task_{i:02}" for i in range(60)]
    loss = {name: {"loss": 1.23456789, "tokens": 3} for name in names}
    lines = [json.dumps(logged_step(i) | {"tasks": loss}) for i in range(1, 3001)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "routing.json").unlink()
    text = page(run)
    assert len(text.encode()) < 1_000_000
    assert "Each point is the mean of 10 logged steps" in text


def test_thinning_takes_means_and_keeps_short_runs_whole() -> None:
    assert points_a_bin(300) == 1 and points_a_bin(301) == 2
    assert thin([(1, 2), (3, 4), (5, 9)], 2) == [(2, 3), (5, 9)]


def test_axes_span_their_values() -> None:
    axis = Axis.over([0.31, 0.72])
    assert axis.low <= 0.31 and axis.high >= 0.72
    flat = Axis.over([0.5])
    assert 0 <= flat.share(0.5) <= 1
    assert Axis.over([410.0], zero=True).low == 0
    assert Axis.of_steps(1050).high == 1050


def test_a_long_table_is_gzipped_and_a_short_one_is_text() -> None:
    rows = [[i, "name, with a comma"] for i in range(5000)]
    kind, packed = csv_link(["i", "name"], rows).split(",", 1)
    assert kind == "data:application/gzip;base64"
    lines = gzip.decompress(base64.b64decode(packed)).decode().splitlines()
    assert len(lines) == 5001 and lines[5000] == '4999,"name, with a comma"'
    assert csv_link(["i", "name"], rows[:2]).startswith("data:text/csv")


def test_durations_read_as_spoken() -> None:
    spoken = [duration(s) for s in (47.9, 725, 3725.2)]
    assert spoken == ["48 s", "12 min 5 s", "1 h 2 min"]
