"""How far a corpus falls into parts, against one that cannot: the same words, dealt out at random.

    share = 1 - SSE(K) / SSE(1)

The control has the same documents in number and length, made of the same words, drawn without
order from all documents; whatever K-means finds in it is chance. Beyond chance is not yet apart:
any real task has topics. So several branches are called worth a try only where the clusters also
stand apart, by their silhouette; the two limits were set on single tasks and on mixtures of them
(docs/discovery.md says how often they are right). HydraLoRA's figure 2 shows that the more
heterogeneous a corpus is, the more a single LoRA loses against full fine-tuning; it gives no
measure of heterogeneity, so this one is ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from manylora.discovery.result import Heterogeneity
from manylora.discovery.space import Embedding, Rows, Space

BEYOND_CHANCE = 0.1
APART = 0.22
_ROWS = 2000
# Thai to Khmer, kana and ideographs are written without spaces: each sign counts as a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """Texts of the same lengths, from the same words in random order."""
    words = [_WORD.findall(text) for text in texts]
    pool = np.array([word for text in words for word in text], dtype=object)
    np.random.default_rng(seed).shuffle(pool)
    ends = np.cumsum([len(text) for text in words])
    return [" ".join(part) for part in np.split(pool, ends[:-1])]


def explained(rows: Rows, k: int, seed: int) -> float:
    """The share of the rows' variance that lies between k clusters of theirs."""
    whole = float(((rows - rows.mean(0)) ** 2).sum())
    if whole < 1e-9 * len(rows):
        return 0.0
    found = KMeans(min(k, len(rows)), n_init=3, random_state=seed).fit(rows)
    return 1.0 - float(found.inertia_) / whole


def heterogeneity(
    texts: Sequence[str], rows: Rows, labels: np.ndarray, seed: int, embedding: Embedding
) -> Heterogeneity:
    """How far apart the clusters are.

    texts, rows, labels: of the sample, the last from 0; embedding: a fresh one for the control.
    """
    k = int(labels.max()) + 1
    few = np.sort(np.random.default_rng(seed).permutation(len(texts))[:_ROWS])
    share = explained(rows[few], max(k, 2), seed)
    control = Space(embedding).fit(shuffled([texts[i] for i in few], seed))
    chance = explained(control, max(k, 2), seed)
    measurable = 2 <= len(np.unique(labels[few])) < len(few)
    apart = float(silhouette_score(rows[few], labels[few])) if measurable else None
    several = k > 1 and share - chance >= BEYOND_CHANCE and apart is not None and apart >= APART
    return Heterogeneity(
        share=share,
        control=chance,
        silhouette=apart,
        several=several,
        advice=_advice(k, several, apart),
    )


def _advice(k: int, several: bool, apart: float | None) -> str:
    stand = "" if apart is None else f" (silhouette {apart:.2f}; {APART:g} or more counts as apart)"
    if several:
        return (
            f"The corpus falls into parts beyond chance{stand}: {k} branches are worth a try, "
            "measured against one LoRA of the same size."
        )
    return f"The corpus hardly falls into parts{stand}: one branch is likely enough."
