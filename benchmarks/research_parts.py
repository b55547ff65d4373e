"""The parts of docs/research.md: what each trains, on what, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from readings import READINGS

from manylora.recipe import Choice

# random.Random(0).sample of the 23 tasks with 100 held-out examples, sorted by name
LEFT_OUT = ("math_gsm8k", "med_medquad", "code_bash", "instr_dolly", "qa_arc", "nli_mnli")
FOUR = ("code_bash", "legal_cuad", "math_gsm8k", "ner_wnut17")


@dataclass(frozen=True)
class Part:
    """methods: names as `manylora compare` takes them; branch_ranks=NEED as `research_ranks.NEEDS`
    has it. The first is the reference, if it is not that of the part `against`.

    tasks: None is all. clusters: those that discovery finds take the place of the tasks in
    training; as many as it finds worth it, or so many. left_out: tasks that are scored
    without being trained on. compile: as a recipe's `train.compile`. wider_rates: whether a method
    whose best trial is its lowest or highest rate has two more beyond it.
    """

    methods: tuple[str, ...]
    budget: str
    epochs: float
    tasks: tuple[str, ...] | None = None
    reading: str = "as_is"
    seeds: int = 3
    clusters: Literal["found"] | int | None = None
    choice: Choice = "told"
    left_out: tuple[str, ...] = ()
    compile: bool = True
    against: str | None = None
    wider_rates: bool = False


SHARED, PRIVATE = "branch_per_cluster_shared", "branch_per_cluster"
ORACLE = ("lora", SHARED, PRIVATE)
# "lora" is the one that meets the budget; PRIVATE, told the task, is one LoRA a task.
BASELINES = (
    *("lora", "lora:r=26", "lora:r=104", "lora:use_rslora=true"),
    *("dora", "hydralora", "multilora", "lora_moe", PRIVATE, "full"),
)
VARIANTS = (
    f"{SHARED}:r=2",
    *(f"{SHARED}:r=2:branch_ranks={need}" for need in ("rows", "loss", "gain")),
    *(f"{SHARED}:{one}" for one in ("share_A=true", "share_B=true", "use_rslora=true")),
    "hydralora:gate=task",
)
# The shared branch learns to answer alone too; then also with LoRA's scaling, alpha / sqrt(r).
FALLBACK = (f"{SHARED}:branch_dropout=0.2", f"{SHARED}:branch_dropout=0.2:use_rslora=true")

# As research_finalists.py says.
FINALISTS = (f"{SHARED}:use_rslora=true", f"{SHARED}:branch_dropout=0.2:use_rslora=true")


def _clusters(methods: tuple[str, ...], **more: object) -> Part:
    """With clusters that were found, and a selector's choices."""
    values: dict[str, object] = {"clusters": "found", "choice": "selector", "left_out": LEFT_OUT}
    return Part(methods, "lora:r=52", **{"epochs": 1} | values | more)  # type: ignore[arg-type]


def _stage_5(epochs: int) -> dict[str, Part]:
    last = {"epochs": epochs, "seeds": 5, "wider_rates": True}
    return {
        "baselines": Part(BASELINES, "lora:r=52", **last),  # type: ignore[arg-type]
        "finalists": _clusters(FINALISTS, left_out=(), against=f"5-baselines-{epochs}", **last),
        "left-out": _clusters(("lora", "lora:use_rslora=true", *FINALISTS), **last),
    }


PARTS = {
    "2-oracle-4": Part(ORACLE, "lora:r=16", epochs=3, tasks=FOUR, compile=False),
    "2-oracle-26": Part(ORACLE, "lora:r=52", epochs=1),
}
PARTS |= {f"3-clusters-{reading}": _clusters(ORACLE[:2], reading=reading) for reading in READINGS}
PARTS |= {
    "4-variants": _clusters(VARIANTS, against="3-clusters-as_is"),
    "4-half": _clusters((SHARED,), clusters=10, against="3-clusters-as_is"),
    "4-twice": _clusters((SHARED,), clusters=40, against="3-clusters-as_is"),
    **{
        f"4-fallback-{reading}": _clusters(
            FALLBACK, reading=reading, against=f"3-clusters-{reading}"
        )
        for reading in READINGS
    },
}
PARTS |= {
    f"5-{kind}-{epochs}": part for epochs in (1, 3) for kind, part in _stage_5(epochs).items()
}
