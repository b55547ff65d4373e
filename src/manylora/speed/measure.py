"""The rows in turns, in one process: what heats, throttles or disturbs the machine disturbs all.

In each round every row makes a few steps, after steps that are not counted, until each has as many
as were asked for. A step is forward, backward and AdamW's update; a GPU's steps are timed by its
own events, one after the other without waiting, a CPU's by the clock. Compiled layers are kept
between the rounds. A row that does not fit the memory is recorded as such, and the others go on.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from manylora.speed.contender import Contender
from manylora.speed.grid import Row

GIB = 2**30
OUT_OF_MEMORY = "out of memory"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """steps: measured steps of a row; turn: of them, how many in a row; warm_up: steps before each
    turn that are not counted, and one more before the first. seconds: stop when they are over.
    backend: torch.compile's.
    """

    steps: int = 20
    turn: int = 5
    warm_up: int = 1
    seconds: float | None = None
    backend: str = "inductor"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("turn", 1), ("warm_up", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass
class Measured:
    """What a row took. activation_gib: the peak of forward and backward above what was held before
    the step; None without a GPU, whose allocator counts. error: why there is no time.
    """

    row: Row
    step_ms: list[float] = field(default_factory=list)
    activation_gib: float | None = None
    adapter_state_gib: float | None = None
    error: str | None = None
    contender: Contender | None = None


def measure(base: PreTrainedModel, rows: Sequence[Row], plan: Plan, say: Say) -> list[Measured]:
    """Measure the rows side by side on the device of `base`, whose weights stay as they are.

    Stops early, with what there is, when `plan.seconds` are over or at Ctrl-C.
    """
    started = time.monotonic()
    found = [Measured(row) for row in rows]
    # Rows differ in their adapters, so they compile the same code anew, each with its own guards.
    limits = {
        "recompile_limit": 64 * len(rows),
        "accumulated_recompile_limit": 256 * len(rows),
        "fail_on_recompile_limit_hit": True,  # else the row would go on in eager mode, unsaid
    }
    with dynamo.patch(limits):
        try:
            while waiting := [m for m in found if not m.error and len(m.step_ms) < plan.steps]:
                for measured in waiting:
                    if plan.seconds is not None and time.monotonic() - started > plan.seconds:
                        say(f"{plan.seconds:g} seconds are over: stopped with what there is")
                        return found
                    take_turn(base, measured, plan, say)
        except KeyboardInterrupt:
            say("stopped with what there is")
    return found


def take_turn(base: PreTrainedModel, measured: Measured, plan: Plan, say: Say) -> None:
    """One turn of one row; what goes wrong in it is the row's error, not the benchmark's."""
    try:
        _turn(base, measured, plan, say)
    except torch.OutOfMemoryError:
        measured.error = OUT_OF_MEMORY
    except Exception as error:
        measured.error = f"{type(error).__name__}: {error}"
    if measured.error:  # outside of except, whose traceback holds the tensors of every frame
        measured.contender, measured.step_ms = None, []
        gc.collect()
        say(f"{measured.row}: {measured.error}")
    elif measured.contender is not None and base.device.type == "cuda":
        measured.contender.move("cpu")
    if base.device.type == "cuda":
        torch.cuda.empty_cache()


def _turn(base: PreTrainedModel, measured: Measured, plan: Plan, say: Say) -> None:
    first = measured.contender is None
    if first:
        measured.contender = _started(base, measured.row, plan, say)
    contender = measured.contender
    assert contender is not None
    if not first:
        contender.move(base.device)
    for _ in range(plan.warm_up - 1):
        contender.step()
    if first:
        _weigh(contender, measured)
    else:
        contender.step()
    count = min(plan.turn, plan.steps - len(measured.step_ms))
    measured.step_ms += timed(contender.step, count, base.device)


def _started(base: PreTrainedModel, row: Row, plan: Plan, say: Say) -> Contender:
    """The row's contender after its first step, which compiles."""
    counters.clear()
    started = time.monotonic()
    contender = Contender(base, row, plan.backend)
    contender.first_step()
    wait_for(base.device)
    words = f"{row}: first step after {time.monotonic() - started:.1f} s"
    if row.mode == "compiled":
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        words += f", {graphs} graphs compiled, {breaks} graph breaks"
    say(words)
    return contender


def _weigh(contender: Contender, measured: Measured) -> None:
    """A step that is not timed, for its memory; the optimizer has its moments by now."""
    on_gpu = contender.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    contender.forward_backward()
    if on_gpu:
        measured.activation_gib = (torch.cuda.max_memory_allocated() - before) / GIB
    contender.update()
    measured.adapter_state_gib = contender.state_bytes() / GIB


def timed(step: Callable[[], None], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` steps."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]
    clock = [time.perf_counter()]
    for _ in range(count):
        step()
        clock.append(time.perf_counter())
    return [1000 * (b - a) for a, b in pairwise(clock)]


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
