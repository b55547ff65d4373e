"""A norm's output by Triton has the bits of torch's own operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interpreted import GPU, PROPERTY, Call, callable_kernels, needs_triton

pytestmark = needs_triton
# The interpreter rounds to bfloat16 in a way of its own.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


@pytest.fixture(scope="module")
def run() -> Iterator[Call]:
    with callable_kernels() as run:
        yield run


@PROPERTY
@given(data=st.data())
def test_a_norm_computed_again_has_the_same_bits(data: st.DataObject, run: Call) -> None:
    lead = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    width = data.draw(st.one_of(st.integers(1, 80), st.sampled_from([1023, 1024, 1025, 2500])))
    dtype = data.draw(st.sampled_from(DTYPES))
    a, b, w = torch.randn(*lead, width), torch.rand(*lead, 1) * 3, torch.randn(width).to(dtype)
    if a.numel() > 3 and data.draw(st.booleans()):
        a.flatten()[:3] = torch.tensor([torch.inf, -1e30, 0.0])
    x, _ = run("norm_product", a, b, w)
    assert x.dtype == dtype and x.shape == a.shape
    torch.testing.assert_close(x, w * (a * b).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrong", ["dtype", "shape", "strides"])
def test_what_is_no_norm_is_refused(wrong: str, run: Call) -> None:
    a, b, w = torch.randn(4, 6), torch.rand(4, 1), torch.randn(6)
    if wrong == "dtype":
        a = a.double()
    if wrong == "shape":
        b = torch.rand(1, 1)
    if wrong == "strides":
        a = torch.randn(6, 4).t()
    with pytest.raises(ValueError, match="must be float32"):
        run("norm_product", a, b, w)
