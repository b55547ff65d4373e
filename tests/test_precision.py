"""In half precision the operation is no less exact than the published loop, whatever the shapes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from manylora.adapter import autograd
from manylora.adapter.layout import Layout
from manylora.methods import resolve

NAMES = ("y", "dx", "dA", "dB", "drouter")
Forward = Callable[..., Tensor]


def loop(W: Tensor, s: float, n: int, r: int) -> Forward:
    """HydraLoRA 2404.19245 eq. 4 and 5, one branch after the other."""

    def forward(x: Tensor, A: Tensor, B: Tensor, R: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        g = torch.softmax(F.linear(x, R), -1, dtype=exact).to(x.dtype)
        y = F.linear(x, W)
        for i in range(n):
            branch = F.linear(F.linear(x, A), B[:, i * r : (i + 1) * r])
            y = y + g[..., i : i + 1] * branch * s
        return y

    return forward


def operation(W: Tensor, s: float, n: int, r: int) -> Forward:
    layout = Layout.of(resolve("hydralora", r=r, num_branches=n)).encode()

    def forward(x: Tensor, A: Tensor, B: Tensor, R: Tensor) -> Tensor:
        rest = None, None, None, layout, s, 0.0, 0.0
        return autograd.apply(x, [W], [], True, [A, R], [[B]], *rest)[0]

    return forward


def results(forward: Forward, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    y = forward(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


def drawn(seed: int) -> tuple[Tensor, list[Tensor], Tensor, int, int]:
    """W, [x, A, B, R], dy, N and r of any shape; every third with tensors that are not dense."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokens, width, out = draw.choice([1, 2, 7, 33, 129]), draw.choice([5, 17, 64, 131]), 1
    out = draw.choice([3, 19, 64, 150])
    n, r = draw.choice([1, 2, 3, 5, 16, 64]), draw.choice([1, 2, 3, 8, 16, 64, 256])
    r = min(r, 1024 // n)

    def one(rows: int, columns: int, size: float) -> Tensor:
        if seed % 3 == 0:
            return torch.randn(2 * columns, rows)[::2].T * size
        return torch.randn(rows, columns) * size

    A, R = one(r, width, width**-0.5), one(n, width, width**-0.5)
    tensors = [one(tokens, width, 1), A, one(out, r * n, r**-0.5), R]
    return one(out, width, width**-0.5), tensors, one(tokens, out, 1), n, r


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_no_less_exact_than_the_published_loop(dtype: torch.dtype) -> None:
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for seed in range(90):
        W, tensors, dy, n, r = drawn(seed)
        W, dy, tensors = W.to(dtype), dy.to(dtype), [tensor.to(dtype) for tensor in tensors]
        exact = [tensor.double() for tensor in tensors]
        truth = results(loop(W.double(), 2.0, n, r), exact, dy.double())
        ours = results(operation(W, 2.0, n, r), tensors, dy)
        theirs = results(loop(W, 2.0, n, r), tensors, dy)
        for name, true, mine, other in zip(NAMES, truth, ours, theirs, strict=True):
            size = true.norm().item()
            off = [(each.double() - true).norm().item() / size for each in (mine, other) if size]
            assert all(map(math.isfinite, off)), (seed, name)
            if off:
                errors[name].append((off[0], off[1]))
    for name, pairs in errors.items():
        mine, other = (math.sqrt(sum(pair[i] ** 2 for pair in pairs)) for i in (0, 1))
        assert mine <= other, name
        assert sum(a <= b for a, b in pairs) > len(pairs) / 2, name


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5), (3, 0, 5), (5,), (2, 3, 4, 5)])
def test_any_leading_shape_also_an_empty_one(shape: tuple[int, ...]) -> None:
    from tiny import attach

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model = attach(One(), method="hydralora", r=2, init_weights=False, target_modules=["linear"])
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    assert y.shape == (*shape[:-1], 7)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("value", [0.0, 1e30, 1e37, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "A", "B", "R", "dy"])
def test_extreme_values_come_out_where_the_loop_has_them(value: float, where: str) -> None:
    # Within a factor of s of the largest number, the order of the factors decides what overflows.
    W, tensors, dy, n, r = drawn(4)
    mine = dict(zip(("x", "A", "B", "R", "dy"), [*tensors, dy], strict=True))[where]
    mine.view(-1)[:: max(1, mine.numel() // 3)] = value
    ours = results(operation(W, 2.0, n, r), tensors, dy)
    theirs = results(loop(W, 2.0, n, r), tensors, dy)
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        ends = torch.isfinite(a), torch.isfinite(b)
        assert torch.equal(*ends), name
        torch.testing.assert_close(a[ends[0]], b[ends[1]], rtol=1e-3, atol=1e-4, msg=name)


def test_equal_inputs_give_equal_bits() -> None:
    W, tensors, dy, n, r = drawn(7)
    first, second = (results(operation(W, 2.0, n, r), tensors, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
