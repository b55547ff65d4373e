"""Training with the model's transformer blocks compiled (`train: {compile: true}`).

Each block is compiled where it is, with its sizes left open, for as long as the training lasts:
scoring, generation and saving see the blocks as they were. All blocks of a model share a graph, and
a later training of a model of the same make takes those of the one before, which a comparison's
cells and a batch that was halved have in common; another make throws them away, since torch keeps
few of one kind.

What torch would do in silence, which is to go on without compiling, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.config as dynamo
import torch._inductor.config as inductor
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.fx.experimental import _config as shapes
from transformers import PreTrainedModel

from manylora.adapter.layer import layers_of
from manylora.adapter.state import states_of
from manylora.training.opened import Opened
from manylora.training.ranks import several_processes

_last_make: list[Any] = []


class CompileError(ValueError):
    """What train.compile=true asks for cannot be had, and why."""


@contextmanager
def compiled_blocks(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """The model's blocks compiled inside, if that is wanted.

    Raises CompileError for a model without known blocks, and for one that torch cannot compile.
    """
    if not wanted:
        yield
        return
    blocks = blocks_of(model)
    make = _make_of(blocks)
    if make != _last_make:
        torch._dynamo.reset()
        _last_make[:] = make
    states = states_of(layers_of(model))
    for block in blocks:
        block.compile(dynamic=True)
    for state in states:
        state.runs_once = True  # there is no checkpointing
    try:
        # A length that happens to be a head's width is not to be taken for it.
        alike = shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        opened = inductor.patch(post_grad_custom_pre_pass=Opened())
        with dynamo.patch(fail_on_recompile_limit_hit=True), alike, opened:
            yield
    except (FailOnRecompileLimitHit, TorchDynamoException) as error:
        _last_make.clear()  # what there is of it is not to be used
        why = f"torch {torch.__version__} cannot compile it ({_reason(error)})"
        if isinstance(error, FailOnRecompileLimitHit):
            why = "it needs more graphs than torch keeps of one"
        raise CompileError(
            f"train.compile=true, and {type(blocks[0]).__name__}: {why}; leave train.compile out"
        ) from error
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        for state in states:
            state.runs_once = False


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers does not split; CompileError where there are none."""
    bases = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    names = {name for base in bases for name in base._no_split_modules or ()}
    blocks = [one for one in model.modules() if type(one).__name__ in names]
    if not blocks:
        own = type([*bases, model][0]).__name__
        raise CompileError(
            f"train.compile=true compiles a model's blocks, and {own} does not name "
            "its blocks (_no_split_modules); leave train.compile out"
        )
    return blocks


def check_compile(wanted: bool) -> None:
    """Raise CompileError, before the work, where blocks are to be compiled and cannot be."""
    if not wanted:
        return
    if several_processes():
        raise CompileError(
            "train.compile=true compiles the blocks of one process, and this run has several; "
            "leave it out, or train with one process"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(_trial, dynamic=True)(torch.ones(64, device=device))
    except Exception as error:
        needed = "triton and a C compiler" if device == "cuda" else "a C++ compiler"
        raise CompileError(
            f"train.compile=true, but torch.compile does not work here ({_reason(error)}); "
            f"install {needed}, or leave train.compile out"
        ) from error


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + x


def _make_of(blocks: list[nn.Module]) -> list[Any]:
    """What a graph depends on, roughly: torch looks closer, and compiles again where it must."""
    first = blocks[0]
    tensors = [(name, p.shape, p.dtype, p.requires_grad) for name, p in first.named_parameters()]
    return [len(blocks), repr(first), tensors, next(first.parameters()).device]


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
