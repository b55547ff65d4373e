"""From an inspection's tables to what the plots take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pandas as pd

from manylora.report.plots import csv_link

DIGITS = 4  # significant, of a number in a page's table


def frame_csv(frame: pd.DataFrame, columns: Sequence[str] | None = None) -> str:
    """A data: address that holds these columns of the table as CSV."""
    chosen = frame if columns is None else frame[list(columns)]
    rows = (
        [f"{value:.{DIGITS}g}" if isinstance(value, float) else value for value in row]
        for row in chosen.astype(object).itertuples(index=False, name=None)
    )
    return csv_link([str(name) for name in chosen.columns], rows)


def in_order(values: pd.Series[str]) -> list[str]:
    """The different values, in the order in which they come."""
    return [str(value) for value in values.unique()]


def wide(frame: pd.DataFrame, rows: str, columns: str, value: str) -> pd.DataFrame:
    """The mean of `value` by `rows` and `columns`, names in the order in which they come."""
    table = frame.groupby([rows, columns], sort=False)[value].mean().unstack(columns)
    kept = table.reindex(index=list(frame[rows].unique()), columns=list(frame[columns].unique()))
    return cast(pd.DataFrame, kept)


def by_depth(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """The mean of `value` by kind of layer (rows) and depth (columns, in order)."""
    table = frame.groupby(["module", "depth"], sort=False)[value].mean().unstack("depth")
    kept = table.reindex(index=in_order(frame["module"]), columns=sorted(set(frame["depth"])))
    return cast(pd.DataFrame, kept)


def family(part: str) -> str:
    """What a part of an update is one of: the whole, branches, tasks, clusters."""
    word = part.split(" ", 1)[0]
    families = {"branch": "branches", "shared": "branches", "task": "tasks", "cluster": "clusters"}
    return families.get(word, "whole")
