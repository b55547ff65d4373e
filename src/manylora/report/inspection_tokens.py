"""Short held-out examples with every token in the colour of the branch it uses most."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from manylora.inspect.frames import Inspection
from manylora.report.curves import colour
from manylora.report.tables import frame_csv

MOST_EXAMPLES = 2  # of a task; of a single layer 1
OPEN = 6
STRONGEST = 75  # percent


@dataclass(frozen=True, slots=True)
class Token:
    """strength: percent of the colour, 0 where all branches are used alike."""

    text: str
    style: str
    strength: int
    label: str


@dataclass(frozen=True, slots=True)
class Example:
    """One example of one task; layer: the one that is shown, "" for the mean over all."""

    run: str
    task: str
    layer: str
    tokens: list[Token]


@dataclass(frozen=True, slots=True)
class TokensView:
    """key: (class, name) of each branch; open: how many examples are shown at once."""

    examples: list[Example]
    open: int
    key: list[tuple[str, str]]
    csv: str


def tokens_view(found: Inspection) -> TokensView | None:
    """The examples, or None where none were kept."""
    tokens = found.frame("tokens")
    if tokens is None:
        return None
    branches = sorted({int(branch) for branch in tokens["branch"].tolist()})
    first = tokens[tokens["example"] < tokens["layer"].eq("").map({True: MOST_EXAMPLES, False: 1})]
    ordered: list[tuple[bool, int, Example]] = []
    for names, rows in first.groupby(["run", "layer", "task", "example"], sort=False):
        run, layer, task, place = names
        shown = Example(str(run), str(task), str(layer), _tokens(rows, len(branches)))
        ordered.append((str(layer) != "", int(place), shown))
    # One of each task before the second of any, and single layers last.
    examples = [shown for *_, shown in sorted(ordered, key=lambda entry: entry[:2])]
    key = [(colour(branch), f"branch {branch}") for branch in branches]
    return TokensView(examples, OPEN, key, frame_csv(tokens))


def _tokens(example: pd.DataFrame, branches: int) -> list[Token]:
    tokens = []
    for _, rows in example.groupby("position", sort=True):
        weights = {int(b): float(w) for b, w in zip(rows["branch"], rows["weight"], strict=True)}
        best = max(weights, key=weights.__getitem__)
        even = 1 / max(branches, 2)
        strength = max(0.0, (weights[best] - even) / (1 - even))
        label = ", ".join(f"branch {b}: {w:.2f}" for b, w in sorted(weights.items()))
        text = str(rows["text"].iloc[0])
        tokens.append(Token(text, colour(best), round(STRONGEST * strength**0.5), label))
    return tokens
