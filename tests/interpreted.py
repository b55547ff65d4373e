"""Calls the Triton kernels where they can run, and compares what they give, for their tests.

On a GPU if there is one; elsewhere in a process of its own under Triton's interpreter, which has to
be chosen before Triton is imported and is right in float32 and float16 (its bfloat16 products are
not).
"""

from __future__ import annotations

import importlib.util
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; it is Linux only: pip install triton",
)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Call = Callable[..., Any]
PROPERTY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def placed(tensor: Tensor) -> Tensor:
    """On the GPU, if there is one, with the strides it has."""
    if not GPU:
        return tensor
    storage = tensor.untyped_storage().cuda()
    empty = torch.empty(0, dtype=tensor.dtype, device="cuda")
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]


def run_here(name: str, *args: Any, **kwargs: Any) -> Any:
    """The function's result, and the tensors it was given, which it may have written to."""
    from manylora.adapter import dropout_kernels, kernels, recompute_kernels

    files = (kernels, dropout_kernels, recompute_kernels)
    function = next(f for file in files if (f := getattr(file, name, None)) is not None)
    args = tuple(placed(arg) if isinstance(arg, Tensor) else arg for arg in args)
    kwargs = {k: placed(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    result = function(*args, **kwargs)
    given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    return back(result), [tensor.cpu() for tensor in given]


def back(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(back(one) for one in result)
    return result.cpu() if isinstance(result, Tensor) else result


def run_pickled(message: bytes) -> bytes:
    name, args, kwargs = pickle.loads(message)
    return pickle.dumps(run_here(name, *args, **kwargs))


@contextmanager
def callable_kernels() -> Iterator[Call]:
    """run(name, ...) calls a function of the kernels; see `run_here`."""
    if GPU:
        yield run_here
        return
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:  # the process starts with the first call
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()
        yield lambda name, *args, **kwargs: pickle.loads(
            pool.submit(run_pickled, pickle.dumps((name, args, kwargs))).result()
        )


def close(got: Tensor, want: Tensor) -> None:
    """One rounding to the dtype, and of sums what float32 leaves of their largest terms."""
    scale = float(want.abs().max()) if want.numel() else 0.0
    rtol = 2 * torch.finfo(got.dtype).eps + 1e-5
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=2e-5 * scale)


def wide(tensor: Tensor, margin: int) -> Tensor:
    """The same numbers, as columns of a wider matrix; with a margin of 3 as a transposed one."""
    if margin == 3:
        return tensor.t().contiguous().t()
    around = torch.full((len(tensor), tensor.shape[1] + 2 * margin), float("nan")).to(tensor.dtype)
    around[:, margin : margin + tensor.shape[1]] = tensor
    return around[:, margin : margin + tensor.shape[1]]
