"""Tables in long form: one row for each number of an array that belongs to a layer and a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd


def long_form(
    names: Sequence[str],
    places: Sequence[tuple[object, ...]],
    numbers: Mapping[str, Sequence[np.ndarray]],
) -> pd.DataFrame:
    """Columns `names`, the same for all numbers of a place, and then one for each of `numbers`.

    numbers: column -> an array for each place; the arrays of a place are of one length.
    """
    first = next(iter(numbers.values()))
    frame = pd.DataFrame(list(places), columns=list(names))
    frame = frame.loc[frame.index.repeat([len(array) for array in first])].reset_index(drop=True)
    for name, arrays in numbers.items():
        frame[name] = np.concatenate([*arrays]) if arrays else []
    return frame
