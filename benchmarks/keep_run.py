"""Keep a run's raw results under benchmarks/results/, with the commit that made them.

python benchmarks/keep_run.py runs/quickstart quickstart
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml
from here import commit

RESULTS = Path(__file__).resolve().parent / "results"


def keep(run: Path, name: str) -> Path:
    def read(file: str) -> str:
        return (run / file).read_text(encoding="utf-8")

    kept = {
        "commit": commit(),
        "recipe": yaml.safe_load(read("recipe.yaml")),
        "summary": json.loads(read("summary.json")),
        "scores": json.loads(read("scores.json")),
        "exports": json.loads(read("exports.json")),
        "metrics": [json.loads(line) for line in read("metrics.jsonl").splitlines()],
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(keep(Path(sys.argv[1]), sys.argv[2]))
