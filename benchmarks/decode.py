"""Decoding at batch 1, eager and as a CUDA graph; branches mixed per token and per prompt.

    python benchmarks/decode.py
    python benchmarks/decode.py --run runs/quickstart
    python benchmarks/decode.py --layers 2 --hidden 64 --intermediate 96 --heads 4 --kv-heads 4 \
        --vocab 128 --prompt 16 --tokens 8 --output /tmp/tiny

The first: LLaMA-2-7B's shapes, random weights, a static cache, 128 tokens after a prompt of 512,
all rows in turns; each graph is recorded after one prompt and timed after another. Appends raw
rows to OUTPUT/decode.jsonl. The second: what per-prompt mixing changes in the output of a trained
run, on its held-out rows (decode_difference.py); writes OUTPUT/decode_difference.json.
COMMIT in the environment says the commit where the tree has no history.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from decode_difference import write_difference
from here import commit, device
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

import manylora
from manylora.speed import results
from manylora.speed.contender import attach
from manylora.speed.grid import AdapterDtype, Row
from manylora.speed.grid import Method as Attached
from manylora.speed.measure import timed
from manylora.speed.model import Shape, random_base, share_weights

RESULTS = Path(__file__).parent / "results"
Method = Literal["frozen", "peft_lora", "merged_lora", "hydralora", "lora_moe"]
Mixing = Literal["none", "token", "prompt"]
ROWS: tuple[tuple[Method, Mixing], ...] = (
    ("frozen", "none"),
    ("peft_lora", "none"),
    ("merged_lora", "none"),
    ("hydralora", "token"),
    ("hydralora", "prompt"),
    ("lora_moe", "token"),
    ("lora_moe", "prompt"),
)
WARM_UP = 3  # steps before a graph is recorded


@dataclass(frozen=True)
class Sizes:
    """r, n: of the adapters; tokens: decoded after a prompt of so many."""

    r: int
    n: int
    prompt: int
    tokens: int


class Decoder:
    """A row ready to decode: its model, a static cache, and on a GPU the recorded step."""

    def __init__(self, base: PreTrainedModel, method: Method, mixing: Mixing, sizes: Sizes) -> None:
        self.method, self.mixing, self.sizes = method, mixing, sizes
        self.device = base.device
        self.model = adapted(base, method, sizes)
        self.around = ExitStack()
        if mixing == "prompt":
            self.around.enter_context(manylora.prompt_mixing(self.model))
        room = sizes.prompt + sizes.tokens + WARM_UP + 1
        self.cache = StaticCache(base.config, max_cache_len=room)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.step_ms: dict[str, list[float]] = {}

    def read(self, prompt: Tensor) -> None:
        """Start again with a prompt (1, tokens)."""
        self.cache.reset()
        out = self.model(input_ids=prompt, past_key_values=self.cache, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    def step(self) -> None:
        """One token: the last one in, the likeliest next one in its place."""
        out = self.model(input_ids=self.token, past_key_values=self.cache)
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    def record(self, prompt: Tensor) -> None:
        """Record a step as a CUDA graph, after this prompt."""
        self.read(prompt)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def steps(self) -> dict[str, Any]:
        modes: dict[str, Any] = {"eager": self.step}
        return modes if self.graph is None else modes | {"cuda_graph": self.graph.replay}

    def written(self, mode: str, prompt: Tensor) -> list[int]:
        """The tokens that follow a prompt."""
        self.read(prompt)
        found = [self.token.clone()]
        for _ in range(self.sizes.tokens - 1):
            self.steps()[mode]()
            found.append(self.token.clone())
        return torch.cat(found).flatten().tolist()

    def turn(self, prompt: Tensor) -> None:
        """Time the tokens after a prompt once more, in each mode."""
        for mode, step in self.steps().items():
            self.read(prompt)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.step_ms.setdefault(mode, []).extend(timed(step, self.sizes.tokens, self.device))


def adapted(base: PreTrainedModel, method: Method, sizes: Sizes) -> Any:
    """The row's model in eval mode, its adapter random; frozen weights are shared but if merged."""
    merged = method == "merged_lora"
    model = copy.deepcopy(base) if merged else share_weights(base)
    attached: Attached = "peft_lora" if method == "merged_lora" else method
    dtype: AdapterDtype = "float32" if base.dtype == torch.float32 else "bfloat16"
    row = Row("eager", attached, r=sizes.r, n=sizes.n, adapter_dtype=dtype)
    holder: Any = attach(model, row)
    torch.manual_seed(0)
    for tensor in holder.parameters():
        if tensor.requires_grad:
            nn.init.normal_(tensor, std=0.02)
    if merged:
        holder = holder.merge_and_unload()
    return holder.eval().requires_grad_(False)


@torch.inference_mode()
def measure(base: PreTrainedModel, sizes: Sizes, rounds: int) -> list[Decoder]:
    """Every row, in turns."""
    vocab = base.config.vocab_size
    drawn = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(vocab, (1, sizes.prompt), generator=drawn).to(base.device) for _ in range(2)
    )
    decoders = [Decoder(base, method, mixing, sizes) for method, mixing in ROWS]
    for one in decoders:
        if base.device.type == "cuda":
            one.record(first)
            eager, graph = (one.written(mode, second) for mode in ("eager", "cuda_graph"))
            same = sum(a == b for a, b in zip(eager, graph, strict=True))
            say(f"{one.method}, {one.mixing}: {same} of {len(eager)} tokens as without the graph")
        else:
            one.written("eager", second)
    for done in range(rounds):
        for one in decoders:
            one.turn(second)
        say(f"round {done + 1} of {rounds}")
    for one in decoders:
        one.around.close()
    return decoders


def raw_rows(decoders: Sequence[Decoder], dtype: torch.dtype) -> list[results.Raw]:
    facts = {"commit": commit(), "device": device(), "torch": torch.__version__}
    found = []
    for one in decoders:
        one_branch = one.method in ("peft_lora", "merged_lora")
        r, n = (0, 0) if one.method == "frozen" else (one.sizes.r, 1 if one_branch else one.sizes.n)
        for mode, times in one.step_ms.items():
            own = {"mode": mode, "method": one.method, "mixing": one.mixing, "r": r, "n": n}
            own |= {"prompt": one.sizes.prompt, "tokens": one.sizes.tokens}
            own |= {"dtype": str(dtype).removeprefix("torch.")}
            found.append(facts | own | {"step_ms": [round(ms, 4) for ms in times]})
    return found


def table(rows: Sequence[results.Raw]) -> str:
    lines = ["| mode | method | mixing | ms/token | / frozen |", "|---|---|---|---:|---:|"]
    for row in rows:
        (frozen,) = (o for o in rows if (o["mode"], o["method"]) == (row["mode"], "frozen"))
        ms = median(row["step_ms"])
        ratio = ms / median(frozen["step_ms"])
        lines.append(
            f"| {row['mode']} | {row['method']} | {row['mixing']} | {ms:.3f} | {ratio:.3f} |"
        )
    return "\n".join(lines)


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a trained run: measure its output instead")
    parser.add_argument("--rows-per-task", type=int, default=40, help="held-out rows, with --run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.run is not None:
        write_difference(given.run, given.rows_per_task, given.output)
        return
    shape = Shape(**{field.name: getattr(given, field.name) for field in fields(Shape)})
    if shape != Shape() and given.output == RESULTS:
        sys.exit(f"{RESULTS} is for LLaMA-2-7B's shapes, and rows do not say theirs: give --output")
    sizes = Sizes(given.r, given.n, given.prompt, given.tokens)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, given.dtype)
    base = random_base(shape, where, sizes.prompt + sizes.tokens + WARM_UP + 1, dtype).eval()
    rows = raw_rows(measure(base, sizes, given.rounds), dtype)
    results.append(given.output / "decode.jsonl", rows)
    print(table(rows))


if __name__ == "__main__":
    main()
