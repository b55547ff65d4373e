"""From lm-eval's values of single examples to means with 95 % intervals.

tasks    percentile bootstrap over the examples, 2,000 resamples; where a metric is no mean of
         its examples (the F1 of CB), lm-eval's own aggregation of 500 resamples
groups   `metrics`: over all examples of the group, as lm-eval's groups are;
         `mean_of_tasks`: the mean of the tasks' means, as OpenCompass (which HydraLoRA used)
         and SuperGLUE have it, with examples drawn again within each task

A difference from another model is paired: both models' values of an example are drawn together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from manylora.evaluate.scores import Interval, interval

RESAMPLES, RESAMPLES_OF_OTHERS = 2000, 500
Values = dict[str, list[Any]]  # by metric, one for each example
Example = dict[str, Any]


def collect(task: str, samples: Sequence[dict[str, Any]]) -> tuple[Values, list[Example]]:
    """lm-eval's logged samples of a task as values by metric, and as rows of a table.

    A metric over a filter of the answers is named METRIC,FILTER, as in lm-eval.
    """
    values: Values = {}
    examples = []
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample[metric]
            name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            values.setdefault(name, []).append(value)
            examples.append(
                {
                    "task": task,
                    "row": sample["doc_id"],
                    "metric": name,
                    "value": float(value) if is_number(value) else None,
                    "target": str(sample["target"]),
                    "answer": _answer(sample),
                }
            )
    return values, examples


def _answer(sample: dict[str, Any]) -> str:
    """The likeliest of the answers that were compared, or what the model wrote first."""
    if len(sample["resps"]) == 1:
        return str(sample["resps"][0][0])
    scores = [answer[0] for answer in sample["filtered_resps"]]
    return str(sample["arguments"][int(np.argmax(scores))][1])


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


def task_intervals(
    values: Values, aggregations: dict[str, Callable[[list[Any]], float]]
) -> dict[str, Interval]:
    """Each metric's mean, or other aggregate, with its interval."""
    found = {}
    for name, items in values.items():
        aggregate = aggregations[name.partition(",")[0]]
        if is_mean(aggregate) and all(map(is_number, items)):
            found[name] = interval([float(item) for item in items])
        else:
            found[name] = _resampled(items, aggregate)
    return found


def differences(values: Values, others: Values) -> Values:
    """Example by example, of the metrics whose values are numbers."""
    return {
        name: [float(item) - float(other) for item, other in zip(items, others[name], strict=True)]
        for name, items in values.items()
        if all(map(is_number, items)) and all(map(is_number, others[name]))
    }


def task_differences(
    values: Values, others: Values, aggregations: dict[str, Callable[[list[Any]], float]]
) -> dict[str, Interval]:
    """Each metric less that of the other model on the same examples."""
    found, numbers = {}, differences(values, others)
    for name, items in values.items():
        aggregate = aggregations[name.partition(",")[0]]
        if is_mean(aggregate) and name in numbers:
            found[name] = interval(numbers[name])
        else:
            pairs = list(zip(items, others[name], strict=True))
            found[name] = _resampled(pairs, partial(_less, aggregate))
    return found


def _less(aggregate: Callable[[list[Any]], float], pairs: list[Any]) -> float:
    mine, theirs = zip(*pairs, strict=True)
    return aggregate(list(mine)) - aggregate(list(theirs))


def beside(examples: Sequence[Example], base: Sequence[Example] | None) -> list[Example]:
    """The examples, each with the value and answer of the base model on it."""
    if base is None:
        return [{**example, "base_value": None, "base_answer": None} for example in examples]
    return [
        {**example, "base_value": other["value"], "base_answer": other["answer"]}
        for example, other in zip(examples, base, strict=True)
    ]


def is_mean(aggregate: Callable[[list[Any]], float]) -> bool:
    from lm_eval.api.metrics import mean

    return aggregate is mean


def _resampled(items: list[Any], aggregate: Callable[[list[Any]], float]) -> Interval:
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(items), size=(RESAMPLES_OF_OTHERS, len(items)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that a resample does not have
        found = [float(aggregate([items[i] for i in places])) for places in drawn]
    low, high = np.percentile(found, [2.5, 97.5])
    return [float(aggregate(items)), float(low), float(high)]


def group_intervals(members: Sequence[Values]) -> dict[str, dict[str, Interval]]:
    """For the metrics that are numbers and that all tasks of a group have."""
    pooled, by_task = {}, {}
    for name in members[0]:
        if all(name in values and all(map(is_number, values[name])) for values in members):
            columns = [np.asarray(values[name], dtype=float) for values in members]
            pooled[name] = interval(np.concatenate(columns).tolist())
            by_task[name] = _mean_of_means(columns)
    return {"metrics": pooled, "mean_of_tasks": by_task}


def _mean_of_means(columns: Sequence[np.ndarray[Any, Any]]) -> Interval:
    rng = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for column in columns:
        total += rng.choice(column, (RESAMPLES, len(column))).mean(1)
    low, high = np.percentile(total / len(columns), [2.5, 97.5])
    mean = float(np.mean([column.mean() for column in columns]))
    return [mean, float(low), float(high)]
