"""docs/inspect.md says what the kept result holds, and its pictures are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def page() -> str:
    return (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")


def test_the_seconds_are_those_that_were_measured() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "inspect_speed.json").read_text())
    names = ("read", "singular_values", "spectra", "subspaces")
    read, values, spectra, shared = (f"{kept[name]['seconds']:.1f}" for name in names)
    words = (
        f"is read in {read} s; its singular values take {values} s, spectra {spectra} s, shared "
        f"directions {shared} s"
    )
    assert words in " ".join(page().split())
    assert kept["layers"] == 224 and sum(kept[name]["seconds"] for name in names) < 60


def test_its_pictures_are_there() -> None:
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", page())
    assert pictures and all((ROOT / "docs" / picture).is_file() for picture in pictures)
