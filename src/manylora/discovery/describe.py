"""What is in each cluster: its terms, its most central documents, the tasks that the data name."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from manylora.discovery.result import Agreement, Central, Cluster

_TERMS, _CENTRAL, _NAMED_BY = 10, 5, 3
_SHOWN = 400
Labels = npt.NDArray[np.int32]


def top_terms(texts: Sequence[str], labels: Labels, k: int) -> list[list[str]]:
    """The words that most set each cluster apart, best first.

    A word counts once for a document. Its score in a cluster is the share of the cluster's
    documents that have it, times the logarithm of that share over the share in all documents.
    Words of one letter, numbers and English function words are left out.
    """
    counter = CountVectorizer(
        token_pattern=r"\b[^\W\d_]\w+\b",
        stop_words=list(ENGLISH_STOP_WORDS),
        binary=True,
        max_features=50_000,
    )
    try:
        words = counter.fit_transform(texts)
    except ValueError:  # no text has a word
        return [[] for _ in range(k)]
    names = counter.get_feature_names_out()
    overall = np.asarray(words.mean(0)).ravel()
    found = []
    for cluster in range(k):
        inside = words[labels == cluster]
        share = np.asarray(inside.mean(0)).ravel() if inside.shape[0] else np.zeros(len(names))
        score = share * np.log((share + 1e-9) / (overall + 1e-9))
        best = np.argsort(-score, kind="stable")[:_TERMS]
        found.append([str(names[i]) for i in best if score[i] > 0])
    return found


def names_of(terms: Sequence[Sequence[str]]) -> list[str]:
    """A name for each cluster that can be a file's: its number and its first terms."""
    names = []
    for number, words in enumerate(terms, start=1):
        plain = [re.sub(r"\W+", "", word) for word in words]
        names.append("-".join([str(number), *[word for word in plain if word][:_NAMED_BY]]))
    return names


def central(
    texts: Sequence[str],
    sources: Sequence[str],
    tasks: Sequence[str],
    similarity: npt.NDArray[np.float32],
    labels: Labels,
    cluster: int,
) -> list[Central]:
    """The documents of a cluster nearest to its centre, each text once, clipped."""
    places = np.flatnonzero(labels == cluster)
    found: dict[str, Central] = {}
    for place in places[np.argsort(-similarity[places], kind="stable")]:
        text = texts[place] if len(texts[place]) <= _SHOWN else texts[place][:_SHOWN] + "..."
        found.setdefault(text, Central(source=sources[place], task=tasks[place], text=text))
        if len(found) == _CENTRAL:
            break
    return list(found.values())


def agreement(tasks: Sequence[str], labels: Labels, k: int) -> Agreement | None:
    """Tasks against clusters; None when the data name fewer than two tasks."""
    named = sorted(set(tasks))
    if len(named) < 2:
        return None
    places = {task: place for place, task in enumerate(named)}
    owners = np.array([places[task] for task in tasks])
    table = np.zeros((len(named), k + 1), dtype=np.int64)
    np.add.at(table, (owners, labels), 1)  # -1, in none, is the last column
    return Agreement(
        rows={task: table[place].tolist() for task, place in places.items()},
        ari=float(adjusted_rand_score(owners, labels)),
        nmi=float(normalized_mutual_info_score(owners, labels)),
    )


def clusters(
    terms: Sequence[list[str]], labels: Labels, centrals: Sequence[list[Central]]
) -> list[Cluster]:
    names = names_of(terms)
    return [
        Cluster(name=names[i], size=int((labels == i).sum()), terms=terms[i], central=centrals[i])
        for i in range(len(names))
    ]
