"""What `interference` comes to: task against task, and what branches have to do with it.

The cosine over the whole adapter is the mean of the layers' cosines, each weighted by the lengths
of the two gradients there:

    cosine = sum over layers of w_l cosine_l,   w_l = |g_t,l| |g_u,l| / (|g_t| |g_u|)

which is what the gradients of all layers, as one vector, give. (interference.py has the sources.)
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from manylora.inspect.interference import ALL, AS_ONE

PAIR = ["run", "task", "other"]


def matrix(frame: pd.DataFrame, part: str = ALL) -> pd.DataFrame:
    """Task x task: the cosine over the whole adapter, 1 on the diagonal; of one run.

    part: as in the table. Raises ValueError for several runs or an unknown part.
    """
    names = list(dict.fromkeys(frame["run"]))
    if len(names) > 1:
        raise ValueError(f"a matrix is of one run, and the table has {', '.join(map(str, names))}")
    tasks = list(frame["task"].unique())
    pairs = _whole(_rows(frame, part)).pivot(index="task", columns="other", values="cosine")
    values = pairs.reindex(index=tasks, columns=tasks).to_numpy(copy=True)
    np.fill_diagonal(values, 1.0)
    return pd.DataFrame(values, index=tasks, columns=tasks)


def conflicts(frame: pd.DataFrame, part: str = ALL) -> pd.DataFrame:
    """Every two tasks, those that conflict most first.

    Columns run, task, other, cosine, agreement, conflict; cosine = agreement - conflict, over the
    whole adapter. NaN, and last, where a task has no gradient.
    """
    return _once(frame, _whole(_rows(frame, part))).sort_values(
        ["cosine", "conflict"], ascending=[True, False], ignore_index=True
    )


def separation(frame: pd.DataFrame) -> pd.DataFrame:
    """Whether branches reduce the conflict between every two tasks, in methods that share A or B.

    Columns run, task, other, apart, as_one: the cosine of the two gradients of all branches, and of
    the gradients that one branch in their place would have had (the same forward pass, so nothing
    else differs). Under a one-hot gate apart is 0. Empty for methods whose branches share nothing:
    compare the `conflict` of two runs there.
    """
    branches = frame[frame["part"].str.fullmatch(r"branch \d+")]
    one = _once(frame, _whole(frame[frame["part"] == AS_ONE]))
    apart = _once(frame, _whole(branches))
    found = one[[*PAIR, "cosine"]].rename(columns={"cosine": "as_one"})
    found = found.merge(apart[[*PAIR, "cosine"]].rename(columns={"cosine": "apart"}), on=PAIR)
    return found[[*PAIR, "apart", "as_one"]]


def _rows(frame: pd.DataFrame, part: str) -> pd.DataFrame:
    found = frame[frame["part"] == part]
    if found.empty and not frame.empty:
        raise ValueError(f"no part {part!r}; the table has {', '.join(frame['part'].unique())}")
    return found


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every ordered pair: cosine, agreement and conflict over all its rows."""
    inner = (rows["cosine"] * rows["norm"] * rows["other_norm"]).fillna(0.0)
    sums = rows[PAIR].assign(
        agreement=inner.clip(lower=0),
        conflict=(-inner).clip(lower=0),
        squared=rows["norm"] ** 2,
        other_squared=rows["other_norm"] ** 2,
    )
    found = sums.groupby(PAIR, sort=False).sum().reset_index()
    lengths = (found["squared"] * found["other_squared"]).pow(0.5)
    lengths = lengths.where(lengths > 0)  # no cosine where a task has no gradient at all
    for name in ("agreement", "conflict"):
        found[name] = found[name] / lengths
    found["cosine"] = found["agreement"] - found["conflict"]
    return found[[*PAIR, "cosine", "agreement", "conflict"]]


def _once(frame: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Each pair in one order alone, that of the tasks in the table."""
    place = {task: i for i, task in enumerate(frame["task"].unique())}
    return pairs[pairs["task"].map(place) < pairs["other"].map(place)].reset_index(drop=True)
