"""Products with a dropped-out x by Triton equal those with the mask that they draw."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interpreted import DEVICE, PROPERTY, Call, callable_kernels, close, needs_triton, wide

pytestmark = needs_triton


@pytest.fixture(scope="module")
def run() -> Iterator[Call]:
    with callable_kernels() as run:
        yield run


@PROPERTY
@given(data=st.data())
def test_products_with_dropout_equal_those_with_its_mask(data: st.DataObject, run: Call) -> None:
    size = st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 129, 200]))
    T, width, K = data.draw(st.tuples(st.one_of(st.just(0), size), size, size))
    p, seed = (
        data.draw(st.sampled_from([0.0, 0.05, 0.5, 0.9])),
        data.draw(st.integers(0, 2**63 - 1)),
    )
    plain = tuple(sorted(data.draw(st.tuples(st.integers(0, K), st.integers(0, K)))))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    margin = data.draw(st.integers(0, 2))
    shapes = {"x": (T, width), "A": (K, width), "dz": (T, K)}
    x, A, dz = (wide(torch.randn(shape).to(dtype), margin) for shape in shapes.values())
    mask, _ = run("dropout_mask", (T, width), p, seed, DEVICE)
    masked, own = mask.double() * x.double() / (1 - p), torch.zeros(K, 1, dtype=torch.float64)
    own[slice(*plain)] = 1
    A64, dz64 = A.double(), dz.double()
    want = masked @ (A64 * (1 - own)).t() + x.double() @ (A64 * own).t()
    close(run("dropout_linear", x, A, p, seed, plain)[0], want)
    want = mask * (dz64 @ (A64 * (1 - own))) / (1 - p) + dz64 @ (A64 * own)
    close(run("dropout_linear_backward_x", dz, A, p, seed, plain)[0], want)
    onto = torch.randn(T, width).to(dtype)
    close(run("dropout_linear_backward_x", dz, A, p, seed, plain, onto)[0], want + onto.double())
    out = torch.full((T, K + 3), 7, dtype=dtype)
    _, given = run("dropout_linear", x, A, p, seed, plain, out[:, 1 : K + 1])
    close(given[-1], run("dropout_linear", x, A, p, seed, plain)[0].double())
    want = (1 - own) * (dz64.t() @ masked) + own * (dz64.t() @ x.double())
    dA, again = (run("dropout_linear_backward_A", dz, x, p, seed, plain)[0] for _ in range(2))
    close(dA, want)
    assert torch.equal(dA, again)


@pytest.mark.parametrize(("T", "width"), [(4100, 9), (2100, 9)])
def test_long_inputs_are_projected_whole(run: Call, T: int, width: int) -> None:
    """A program takes more tokens the more there are."""
    x, A = torch.randn(T, width), torch.randn(3, width)
    mask, _ = run("dropout_mask", (T, width), 0.25, 7, DEVICE)
    close(run("dropout_linear", x, A, 0.25, 7)[0], mask * x.double() @ A.double().t() / 0.75)


def test_parts_of_several_blocks_add_up_to_the_gradient(run: Call) -> None:
    x, dz = torch.randn(1090, 1020), torch.randn(1090, 3)
    mask, _ = run("dropout_mask", (1090, 1020), 0.25, 7, DEVICE)
    got, _ = run("dropout_linear_backward_A", dz, x, 0.25, 7)
    close(got, dz.double().t() @ (mask * x.double()) / 0.75)


def test_a_mask_depends_on_place_and_seed_alone_and_drops_with_its_probability(run: Call) -> None:
    large, _ = run("dropout_mask", (300, 500), 0.3, 11, DEVICE)
    small, _ = run("dropout_mask", (37, 129), 0.3, 11, DEVICE)
    assert torch.equal(large[:37, :129], small)
    # Of 150,000 draws, 4.5 standard deviations; of 300 or 500, 5 and a little.
    assert abs(float(large.double().mean()) - 0.7) < 0.0054
    assert float((large.double().mean(0) - 0.7).abs().max()) < 0.14
    assert float((large.double().mean(1) - 0.7).abs().max()) < 0.11
    for seed in (12, 11 + 2**32, 11 + 2**62):
        other, _ = run("dropout_mask", (300, 500), 0.3, seed, DEVICE)
        assert abs(float((large == other).double().mean()) - 0.58) < 0.006
    for axis, shift in ((0, 1), (1, 1), (1, 4), (1, 8)):  # neighbours are independent
        assert abs(float((large == large.roll(shift, axis)).double().mean()) - 0.58) < 0.006


def test_a_dropped_infinity_is_nan_as_in_torch(run: Call) -> None:
    x = torch.ones(64, 16)
    x[:, 3] = float("inf")
    mask, _ = run("dropout_mask", (64, 16), 0.5, 1, DEVICE)
    z, _ = run("dropout_linear", x, torch.ones(2, 16), 0.5, 1, (1, 2))
    torch.testing.assert_close(z[:, 0], (mask * x / 0.5).sum(1), equal_nan=True)
    assert torch.equal(z[:, 1], x.sum(1))


@pytest.mark.parametrize(
    ("p", "seed", "columns", "message"),
    [(1.0, 1, 8, "p=1.0"), (-0.1, 1, 8, "p=-0.1"), (0.1, -1, 8, "seed=-1"), (0.1, 1, 7, "A must")],
)
def test_dropout_refuses_what_it_cannot_draw(
    run: Call, p: float, seed: int, columns: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run("dropout_linear", torch.zeros(3, 8), torch.zeros(2, columns), p, seed)
