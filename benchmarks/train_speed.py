"""How long a whole training run takes, beside TRL with PEFT's LoRA: same rows, model, rank, steps.

    python benchmarks/train_speed.py [--steps 20] [--rounds 3] [--method hydralora]

Each run is a process of its own, from reading the data to the saved adapter; the sides take turns.
Writes benchmarks/results/train_speed.json: every run's seconds, with device and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from here import about_here

RESULT = Path(__file__).parent / "results" / "train_speed.json"
RATE, BATCH, RANK = 1e-3, 8, 8

TRL = """
import json, sys
from pathlib import Path
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from manylora.base import load_model, load_tokenizer
from manylora.corpus import samples_path
model, steps, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rows = []
for file in sorted((samples_path() / "train").glob("*.jsonl")):
    for line in file.open():
        row = json.loads(line)
        prompt = row["instruction"] + ("\\n" + row["input"] if row.get("input") else "")
        rows.append({
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        })
trainer = SFTTrainer(
    model=load_model(model),
    processing_class=load_tokenizer(model),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir=out, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE,
        bf16=BF16, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, max_length=1024, completion_only_loss=True,
    ),
)
trainer.train()
trainer.save_model(out)
"""

OURS = """
import sys
from manylora.recipe import load_recipe
from manylora.train import train
model, steps, out, method = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4]
train(load_recipe(None, [
    "data=samples", f"model={model}", f"output={out}/run", f"adapter.method={method}",
    f"adapter.r={RANK}", f"train.max_steps={steps}", f"train.batch_size={BATCH}",
    f"train.learning_rate={RATE}", "evaluate.rows_per_task=0", "train.precision=PRECISION",
]))
"""


def seconds(program: str, model: str, steps: int, method: str, precision: str) -> float:
    """Wall time of one run in a fresh process."""
    values = {"RANK": RANK, "BATCH": BATCH, "RATE": RATE}
    for name, value in values.items():
        program = program.replace(f"={name}", f"={value}").replace(f"{{{name}}}", str(value))
    program = program.replace("BF16", str(precision == "bf16")).replace("PRECISION", precision)
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        command = [sys.executable, "-c", program, model, str(steps), out, method]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    given = parser.parse_args()
    runs: dict[str, list[float]] = {"trl_peft_lora": [], "manylora_lora": [], "manylora_hydra": []}
    for number in range(given.rounds):
        for side in runs:
            program = TRL if side == "trl_peft_lora" else OURS
            method = "hydralora" if side == "manylora_hydra" else "lora"
            took = seconds(program, given.model, given.steps, method, given.precision)
            runs[side].append(round(took, 2))
            print(f"round {number + 1}: {side} {took:.1f} s", flush=True)
    middle = {side: statistics.median(took) for side, took in runs.items()}
    result = {
        **about_here(),
        **vars(given),
        "batch_size": BATCH,
        "rank": RANK,
        "seconds": runs,
        "median_seconds": middle,
        "of_trl": {side: round(took / middle["trl_peft_lora"], 3) for side, took in middle.items()},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["of_trl"], indent=2))


if __name__ == "__main__":
    main()
