"""Many small matrices are decomposed quicker on one thread.

LAPACK's threads wait for each other several times a matrix: on two cores that others use as well,
the QR of a 4096 x 48 matrix took 224 ms with two threads, and 6 ms with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread inside; afterwards on as many as before. Also a decorator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
