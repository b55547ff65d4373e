"""Kill a training run at random moments, resume it, and compare it with an undisturbed one.

python benchmarks/kill_test.py 40        # trials; the figures go to results/kill_test.json

Each trial kills a run with SIGKILL at a random moment of the undisturbed run's length, resumes it,
kills every second resumed one again, and resumes until it ends. Weights, scores.json, routing.json,
the log (without its times) and the token count must equal the undisturbed run's, bit for bit.
Files are written in two halves with a pause between, so that many kills fall into a write.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from here import about_here  # noqa: E402

from killing import Warm, assert_same_result, changes_of  # noqa: E402
from tiny import save_tiny_model, write_tasks  # noqa: E402

RESULT = HERE / "results" / "kill_test.json"
RECIPE: dict[str, Any] = {
    "holdout": 0.2,
    "adapter": {"method": "hydralora", "r": 4, "lora_dropout": 0.2},
    "train": {
        "max_steps": 30,
        "checkpoint_every": 3,
        "log_every": 4,
        "learning_rate": 0.02,
        "precision": "fp32",
    },
    "evaluate": {"rows_per_task": 6},
}


def trial(warm: Warm, number: int, folder: Path, whole: Path, seconds: float) -> dict[str, Any]:
    """One run, killed once or more."""
    draw = random.Random(number)
    run = folder / f"killed{number}"
    changes = recipe_in(folder, run)
    kills: list[dict[str, Any]] = []
    again = True
    while again:
        after = draw.uniform(0.01, seconds)
        ended = warm.run(changes, resume=bool(kills), kill={"after": after})
        if ended.code == -9:
            kills.append({"after": round(after, 3), "phase": ended.phase, "step": ended.step})
            again = draw.random() < 0.5
        elif kills:  # the resumed run ended first
            break
        else:
            shutil.rmtree(run)
            seconds = min(seconds, ended.seconds)
    if ended.code == -9:
        ended = warm.run(changes, resume=True)
    if ended.code:
        return {"kills": kills, "equal": False, "why": ended.error.splitlines()[-1]}
    try:
        assert_same_result(whole, run)
    except AssertionError as error:
        return {"kills": kills, "equal": False, "why": str(error)}
    return {"kills": kills, "equal": True}


def recipe_in(folder: Path, run: Path) -> list[str]:
    paths = {"model": folder / "model", "data": folder / "tasks", "output": run}
    return changes_of(RECIPE | {key: str(path) for key, path in paths.items()})


def main(trials: int) -> None:
    with tempfile.TemporaryDirectory() as name, Warm() as warm:
        folder = Path(name)
        save_tiny_model(folder / "model")
        write_tasks(folder / "tasks", rows=40)
        whole = folder / "whole"
        ended = warm.run(recipe_in(folder, whole))
        assert ended.code == 0, ended.error
        done = []
        for number in range(trials):
            done.append(trial(warm, number, folder, whole, ended.seconds))
            print(number, json.dumps(done[-1]), flush=True)
    kills = [kill for one in done for kill in one["kills"]]
    result = {
        **about_here(),
        "recipe": RECIPE,
        "undisturbed_seconds": round(ended.seconds, 2),
        "trials": trials,
        "equal": sum(one["equal"] for one in done),
        "kills": len(kills),
        "kills_by_phase": dict(Counter(kill["phase"] for kill in kills).most_common()),
        "each": done,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['equal']} of {trials} trials equal, {len(kills)} kills: {RESULT}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(int(sys.argv[1]))
