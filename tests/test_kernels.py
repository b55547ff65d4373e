"""Mixing by Triton equals a loop written from its equations, and torch where numbers end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from interpreted import PROPERTY, Call, callable_kernels, close, needs_triton, wide

pytestmark = needs_triton
Margins = tuple[int, int, int]


@pytest.fixture(scope="module")
def run() -> Iterator[Call]:
    with callable_kernels() as run:
        yield run


@dataclass
class Mixing:
    """How z is laid out, in the order in which the kernels take it."""

    n: int
    N: int
    r: int
    share_A: bool
    share_B: bool
    router: bool

    def widths(self, r0: int) -> tuple[int, int]:
        """Of a layer in z and in u."""
        rows = self.r if self.share_A else self.N * self.r
        mixed = self.r if self.share_B else self.N * self.r
        return rows + self.N * self.router + r0, mixed + r0


def loop(z: Tensor, m: Mixing, weights: Tensor | None, r0: int, s: float, s0: float) -> Tensor:
    """u, layer by layer and branch by branch, in z's dtype."""
    block, _ = m.widths(r0)
    layers = []
    for j in range(m.n):
        mine = z[:, j * block : (j + 1) * block]
        rows = m.r if m.share_A else m.N * m.r
        h, logits, h0 = mine[:, :rows], mine[:, rows : block - r0], mine[:, block - r0 :]
        g = torch.ones(len(z), m.N, dtype=z.dtype)
        if m.router:
            g = torch.softmax(logits, -1)
        elif weights is not None:
            g = weights[:, j if weights.shape[1] > 1 else 0].to(z.dtype)
        branches = [
            s * (g[:, i : i + 1] * (h if m.share_A else h[:, i * m.r : (i + 1) * m.r]))
            for i in range(m.N)
        ]
        mixed = torch.stack(branches).sum(0) if m.share_B else torch.cat(branches, 1)
        layers.append(torch.cat([mixed, s0 * h0], 1))
    return torch.cat(layers, 1)


def gradients(
    du: Tensor, z: Tensor, m: Mixing, weights: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    z = z.clone().requires_grad_()
    w = None if weights is None else weights.clone().requires_grad_()
    loop(z, m, w, *rest).backward(du)
    dz = torch.zeros_like(z) if z.grad is None else z.grad
    return dz, None if w is None else w.grad


GATES = ["router", "ones", "of each layer", "of all layers", "of all tokens"]


def compare(
    run: Call, m: Mixing, gate: str, T: int, r0: int, pad: int, dtype: torch.dtype, margins: Margins
) -> None:
    """The kernels with the loop on random numbers; margins: of z, du and u, see `wide`."""
    (block, width), s = m.widths(r0), (1.7, 0.3)
    z = torch.randn(T, m.n * block + pad).to(dtype)
    z[:, m.n * block :] = float("nan")
    z, du = wide(z, margins[0]), wide(torch.randn(T, m.n * width).to(dtype), margins[1])
    weights = None
    if gate.startswith("of"):
        weights = torch.rand(T, m.n if gate == "of each layer" else 1, m.N)
        weights = weights[:1].expand(T, -1, -1) if gate == "of all tokens" else weights
    u, _ = run("mix_forward", z, *astuple(m), weights, r0, *s)
    again = wide(torch.zeros(T, m.n * width, dtype=dtype), margins[2])
    (dz, dweights), given = run(
        "mix_backward", du, z, *astuple(m), weights, r0, *s, weights is not None, u=again
    )
    exact = z[:, : m.n * block].double(), m, None if weights is None else weights.double(), r0, *s
    assert u.dtype == dz.dtype == dtype
    close(u, loop(*exact))
    want_dz, want_dweights = gradients(du.double(), *exact)
    close(dz[:, : m.n * block], want_dz)
    assert torch.equal(dz[:, m.n * block :], torch.zeros(T, pad, dtype=dtype))
    assert torch.equal(given[-1], u)
    if weights is not None:
        assert dweights.shape == weights.shape
        close(dweights, want_dweights)


@PROPERTY
@given(data=st.data())
def test_mixing_and_its_gradients_equal_the_loop_at_any_size(
    data: st.DataObject, run: Call
) -> None:
    rank = st.one_of(st.integers(1, 9), st.sampled_from([16, 33, 64, 255, 256]))
    count = st.one_of(st.integers(1, 5), st.sampled_from([8, 31, 63, 64]))
    flag, few = st.booleans(), st.integers(0, 9)
    gate = data.draw(st.sampled_from(GATES))
    sizes = data.draw(st.tuples(st.integers(1, 3), count, rank, flag, flag))
    tail = data.draw(st.tuples(few, st.sampled_from([0, 1, 5, 32]), few))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    margins = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    compare(run, Mixing(*sizes, gate == "router"), gate, *tail, dtype, margins)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True), (True, True)])
def test_every_kind_of_mixing_equals_the_loop_over_several_programs(
    run: Call, gate: str, shared: tuple[bool, bool]
) -> None:
    m = Mixing(2, 3, 5, *shared, gate == "router")
    compare(run, m, gate, 70, 2, 3, torch.float32, (1, 2, 1))


SPECIAL = [float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e-38, 0.0]


@pytest.mark.parametrize(
    "flags",  # A shared, B shared, router; with all three the router's gradient is rounding alone
    [flags for flags in product((False, True), repeat=3) if not all(flags)],
)
def test_infinities_and_huge_values_end_as_in_torch(
    run: Call, flags: tuple[bool, bool, bool]
) -> None:
    torch.manual_seed(0)
    m, rest, T = Mixing(2, 3, 3, *flags), (None, 2, 1.7, 0.6), 3 * 20 * len(SPECIAL)
    block, width = m.widths(2)
    z, du = torch.randn(T, 2 * block), torch.randn(T, 2 * width)
    for t in range(T):
        value = SPECIAL[t % len(SPECIAL)]
        if t % 3 != 1:
            z[t, torch.randint(2 * block, ())] = value
        if t % 3 != 0:
            du[t, torch.randint(2 * width, ())] = value
    z[0], du[1] = 0.0, 0.0
    u, _ = run("mix_forward", z, *astuple(m), *rest)
    (dz, _), _ = run("mix_backward", du, z, *astuple(m), *rest)
    want_u, want_dz = loop(z, m, *rest), gradients(du, z, m, *rest)[0]
    assert want_dz.isnan().any() and want_dz.isinf().any()
    torch.testing.assert_close(u, want_u, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(dz, want_dz, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_equal_inputs_give_equal_bits(run: Call) -> None:
    torch.manual_seed(0)
    z, du, weights = torch.randn(40, 48), torch.randn(40, 48), torch.rand(40, 1, 4)
    mixing = du, z, 1, 4, 12, False, False, False, weights, 0, 1.0, 1.0, True
    (first, dweights), _ = run("mix_backward", *mixing)
    (second, dweights_again), _ = run("mix_backward", *mixing)
    assert torch.equal(first, second) and torch.equal(dweights, dweights_again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(4, 8)}, "at least 9"),
        ({"z": torch.zeros(9, 4).t()}, "dense rows"),
        ({"z": torch.zeros(4, 9, dtype=torch.float64)}, "float32 or less"),
        ({"weights": torch.zeros(4, 1, 3)}, "router=False"),
        ({"weights": torch.zeros(4, 3), "router": False}, r"weights must be \(4, 1, 3\)"),
        ({"r": 4096, "N": 64, "z": torch.zeros(1, 10**6)}, "mix_fits"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused(run: Call, change: Any, message: str) -> None:
    z = torch.zeros(4, 9)
    fields = {"n": 1, "N": 3, "r": 2, "share_A": False, "share_B": False, "router": True}
    given = {"z": z, **fields, "weights": None, "r0": 0, "s": 1.0, "s0": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        run("mix_forward", *given.values())


def test_mix_fits_says_what_is_refused(run: Call) -> None:
    assert run("mix_fits", 64, 256)[0] and run("mix_fits", 1, 1)[0]
    assert not run("mix_fits", 64, 1024)[0] and not run("mix_fits", 1, 1, 10**5)[0]


def test_manylora_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import manylora"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
