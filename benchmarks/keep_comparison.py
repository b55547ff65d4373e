"""Keep a comparison: its raw rows and figures, and its page and tables for people.

python benchmarks/keep_comparison.py runs/four_tasks compare four_tasks

writes benchmarks/results/compare.parquet and .json, and docs/comparison/four_tasks.html and .md.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from here import commit

ROOT = Path(__file__).resolve().parents[1]


def keep(folder: Path, name: str, title: str) -> None:
    results, pages = ROOT / "benchmarks" / "results", ROOT / "docs" / "comparison"
    pages.mkdir(exist_ok=True)
    shutil.copyfile(folder / "rows.parquet", results / f"{name}.parquet")
    said = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    kept = json.dumps({"commit": commit(), **said}, indent=1)
    (results / f"{name}.json").write_text(kept + "\n", encoding="utf-8")
    for kind in ("html", "md"):
        shutil.copyfile(folder / f"comparison.{kind}", pages / f"{title}.{kind}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    keep(Path(sys.argv[1]), *sys.argv[2:])
