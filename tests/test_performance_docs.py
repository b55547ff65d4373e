"""docs/performance.md has the tables that follow from the kept rows."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from manylora.speed import electricity, results

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results"
SWEPT = ("mode", "method", "r", "n", "tokens", "dropout", "adapter_dtype")
KEYS = ("mode", "method", "targets", "n", "checkpointing")


def written(page: str, name: str) -> str:
    """What stands on the page after <!-- name -->."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert found is not None, name
    return found[1].strip()


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_the_tables_of_a_step_follow_from_the_rows(page: str) -> None:
    rows = results.read(KEPT / "speed.jsonl")
    commit = rows[0]["commit"]
    main = [row for row in rows if row["tokens"] == 8192]
    others = [row for row in rows if row["tokens"] != 8192]
    assert all(len(row["step_ms"]) >= results.LEAST_STEPS for row in main)
    assert written(page, f"speed {commit}") == results.table(main, KEYS)
    assert written(page, f"sweep {commit}") == results.table(others, SWEPT)


def test_the_table_of_energy_follows_from_its_blocks(page: str) -> None:
    lines = (KEPT / "speed_energy.jsonl").read_text(encoding="utf-8").splitlines()
    assert written(page, "energy") == electricity.table([json.loads(line) for line in lines])


def test_the_table_of_dropout_follows_from_its_rows(page: str) -> None:
    lines = (KEPT / "dropout_paths.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {(r["width"], r["tokens"], r["path"]): r for r in map(json.loads, lines)}
    for (width, tokens, path), row in rows.items():
        if path == "kernels":
            ms = [row["gpu_us"], rows[width, tokens, "masks"]["gpu_us"]]
            issue = [row["issue_us"], rows[width, tokens, "masks"]["issue_us"]]
            cells = [width, tokens, *(f"{us:.0f}" for us in (*ms, *issue))]
            assert f"| {' | '.join(map(str, cells))} |" in written(page, "dropout")


def test_the_newest_rows_meet_the_targets() -> None:
    for target in results.targets(results.read(KEPT / "speed.jsonl")):
        assert str(target).endswith(", met"), target


def test_the_readme_says_what_the_rows_say() -> None:
    rows = results.read(KEPT / "speed.jsonl")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ratios = {}
    for mode in ("eager", "compiled"):
        one = results.find(rows, method="hydralora", n=3, mode=mode, checkpointing=False)
        assert one is not None
        frozen, peft = results.frozen_of(rows, one), results.peft_of(rows, one)
        ratios[mode] = (results.times(one, frozen), results.times(one, peft))
    (a, b), (c, d) = ratios["eager"], ratios["compiled"]
    words = f"takes {a:.2f} of a frozen step (compiled {c:.2f}) and its memory, {b:.2f} ({d:.2f})"
    assert words in " ".join(readme.split())


def test_the_figures_of_a_cpu_follow_from_the_rows(page: str) -> None:
    rows = results.read(KEPT / "cpu_step.jsonl")
    for tokens, words in (
        (256, "LoRA {}, HydraLoRA N = 3 {}, MultiLoRA N = 3 {}"),
        (16, "LoRA {}, HydraLoRA {}, MultiLoRA {}"),
    ):
        own = [row for row in rows if row["tokens"] == tokens]
        peft = results.find(own, method="peft_lora")
        found = [results.find(own, method=name) for name in ("lora", "hydralora", "multilora")]
        ratios = [f"{results.times(row, peft):.2f}" for row in found]
        assert words.format(*ratios) in " ".join(page.split())


def test_the_table_of_decoding_follows_from_the_rows(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = runpy.run_path(str(ROOT / "benchmarks" / "decode.py"))["table"]
    lines = (KEPT / "decode.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    newest = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    assert written(page, "decode") == table(newest)
