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


def commit_of(page: str, name: str) -> str:
    """The commit whose rows a table of the page shows."""
    found = re.search(rf"<!-- {name} (\w+) -->", page)
    assert found is not None, name
    return found[1]


@pytest.fixture(scope="module")
def workload(page: str) -> list[results.Raw]:
    """The rows at the reference workload, of the last commit that measured them."""
    rows = results.read(KEPT / "speed.jsonl", commit_of(page, "speed"))
    lines = (KEPT / "speed.jsonl").read_text(encoding="utf-8").splitlines()
    measured = [row for row in map(json.loads, lines) if row["tokens"] == 8192]
    assert measured[-1]["commit"] == rows[0]["commit"]
    return [row for row in rows if row["tokens"] == 8192]


def test_the_tables_of_a_step_follow_from_the_rows(page: str, workload: list[results.Raw]) -> None:
    swept = results.read(KEPT / "speed.jsonl", commit_of(page, "sweep"))
    assert written(page, f"speed {workload[0]['commit']}") == results.table(workload, KEYS)
    assert written(page, f"sweep {swept[0]['commit']}") == results.table(swept, SWEPT)
    for row in (*workload, *swept):
        assert len(row["step_ms"]) >= results.LEAST_STEPS or row["error"] == "out of memory"


def test_what_is_said_of_small_steps_follows_from_the_rows(page: str) -> None:
    rows = results.read(KEPT / "speed.jsonl", commit_of(page, "sweep"))

    def of_peft(mode: str, method: str, tokens: int, dropout: float) -> str:
        same = {"mode": mode, "tokens": tokens, "dropout": dropout, "r": 16}
        found = results.find(rows, method=method, adapter_dtype="bfloat16", **same)
        assert found is not None
        ratio = results.times(found, results.peft_of(rows, found))
        assert ratio is not None
        return f"{ratio:.2f}"

    lora, hydra, lora_c, hydra_c = (
        of_peft(mode, method, 2048, 0.0)
        for mode in ("eager", "compiled")
        for method in ("lora", "hydralora")
    )
    words = [f"{lora} of PEFT's step eager and {lora_c} compiled, HydraLoRA {hydra} and {hydra_c}"]
    a, b, c, d = (
        of_peft(mode, method, 4096, 0.05)
        for method in ("lora", "hydralora")
        for mode in ("eager", "compiled")
    )
    words.append(f"LoRA takes {a} and {b} of PEFT's, HydraLoRA {c} and {d}")
    small = [of_peft(mode, "hydralora", 2048, 0.05) for mode in ("eager", "compiled")]
    words.append(f"HydraLoRA {small[0]} and {small[1]}")
    for one in words:
        assert one in " ".join(page.split())


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


def test_the_newest_rows_meet_the_targets(workload: list[results.Raw]) -> None:
    for target in results.targets(workload):
        assert str(target).endswith(", met"), target


def test_the_readme_says_what_the_rows_say(workload: list[results.Raw]) -> None:
    rows = workload
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
    of_loop = []
    for mode in ("eager", "compiled"):
        at = {"mode": mode, "checkpointing": True, "n": 3}
        ours, loop = (results.find(rows, method=m, **at) for m in ("hydralora", "loop_hydralora"))
        of_loop.append(results.times(ours, loop))
    words = f"with checkpointing, {of_loop[0]:.2f} ({of_loop[1]:.2f}) of the published loop"
    assert words in " ".join(readme.split())


def test_the_figures_of_a_cpu_follow_from_the_rows(page: str) -> None:
    rows = results.read(KEPT / "cpu_step.jsonl")
    for tokens, words in (
        (
            256,
            "LoRA {}, HydraLoRA N = 3 {}, MultiLoRA N = 3 {}, "
            "a branch chosen by id (N = 3, cluster) {}",
        ),
        (16, "LoRA {}, HydraLoRA {}, MultiLoRA {}, cluster {}"),
    ):
        own = [row for row in rows if row["tokens"] == tokens]
        peft = results.find(own, method="peft_lora")
        names = ("lora", "hydralora", "multilora", "cluster")
        found = [results.find(own, method=name) for name in names]
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
