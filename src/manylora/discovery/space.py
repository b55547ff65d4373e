"""The space in which documents are clustered: each document a unit vector of a few dimensions.

    z = unit(e(content) + 4 * mean over its repeated sentences of m(sentence))
    m(sentence) = mean of e(content) over the documents that have the sentence

e is TF-IDF of words, marks and character n-grams, reduced by a truncated SVD (latent semantic
analysis), or the base model's embedding. Everything is fitted on a sample and then the same for any
text, so that a corpus of any size takes the memory of the sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from joblib import Parallel, delayed
from scipy.sparse import hstack
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from manylora.discovery.segments import Segments

Rows = npt.NDArray[np.float32]
Told = Callable[[int], None]

DIMENSIONS = 50
PULL = 4.0
_AT_ONCE = 20_000
_MANY = 200_000


class Embedding(Protocol):
    """Contents as unit rows."""

    def fit(self, contents: Sequence[str]) -> Rows: ...

    def rows(self, contents: Sequence[str]) -> Rows: ...

    @property
    def about(self) -> dict[str, Any]:
        """What it is made of, for `settings`."""


class Tfidf:
    """TF-IDF of words, single marks and line ends, and of character 2- to 4-grams within words.

    Marks and n-grams carry the form of a text (a list of options, code, a question) and any script;
    words carry its topic. Counts are taken as 1 + log, each view has unit length, and the commonest
    features are kept (`words`, `grams`).
    """

    def __init__(self, seed: int, words: int = 50_000, grams: int = 30_000) -> None:
        self.seed, self.limits = seed, (words, grams)

    def fit(self, contents: Sequence[str]) -> Rows:
        few = len(contents) < 100
        words, grams = self.limits
        self.views = [
            TfidfVectorizer(
                token_pattern=r"\w+|[^\w\s]|\n",
                sublinear_tf=True,
                min_df=1 if few else 2,
                max_features=words,
                dtype=np.float32,
            ),
            TfidfVectorizer(
                analyzer="char_wb",
                ngram_range=(2, 4),
                sublinear_tf=True,
                min_df=1 if few else 3,
                max_features=grams,
                dtype=np.float32,
            ),
        ]
        counts = hstack([_fitted(view, contents) for view in self.views]).tocsr()
        most = min(counts.shape) - 1
        self.svd = TruncatedSVD(min(DIMENSIONS, max(most, 1)), random_state=self.seed)
        with np.errstate(invalid="ignore"):  # of the share of no variance, where all are equal
            return unit(self.svd.fit_transform(counts))

    def rows(self, contents: Sequence[str]) -> Rows:
        counts = hstack([view.transform(contents) for view in self.views]).tocsr()
        return unit(self.svd.transform(counts))

    @property
    def about(self) -> dict[str, Any]:
        words, grams = (len(view.vocabulary_) for view in self.views)
        kept = float(np.nan_to_num(self.svd.explained_variance_ratio_.sum()))
        return {
            "features": "TF-IDF",
            "words": words,
            "character n-grams": grams,
            "dimensions": int(self.svd.n_components),
            "variance kept": round(kept, 3),
        }


def _fitted(view: TfidfVectorizer, contents: Sequence[str]) -> Any:
    try:
        return view.fit_transform(contents)
    except ValueError:  # nothing is in two documents, as with words of a script without spaces
        return view.set_params(min_df=1).fit_transform(contents)


class Space:
    """Where each document is, by its content and by the sentences it shares."""

    def __init__(self, embedding: Embedding) -> None:
        self.embedding = embedding

    def fit(self, texts: Sequence[str]) -> Rows:
        """(texts, dimensions) unit rows of the sample that everything is learned from."""
        self.segments = Segments(texts)
        own = self.embedding.fit([self.segments.content(text) for text in texts])
        shared = self.segments.shared(texts)
        having = (shared > 0).astype(np.float32)
        counts = np.asarray(having.sum(0)).ravel()
        self.means = np.asarray(having.T @ own / np.maximum(counts, 1)[:, None], dtype=np.float32)
        return unit(own + PULL * (shared @ self.means))

    def rows(self, texts: Sequence[str]) -> Rows:
        """Unit rows of any texts, without learning from them."""
        own = self.embedding.rows([self.segments.content(text) for text in texts])
        return unit(own + PULL * (self.segments.shared(texts) @ self.means))

    def in_parts(self, texts: Sequence[str], told: Told) -> Rows:
        """`rows` of many texts, on all cores where that is worth it; told of each thousand done."""
        parts = [texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE)]
        several = len(texts) > _MANY and isinstance(self.embedding, Tfidf)
        done = Parallel(n_jobs=os.cpu_count() if several else 1, return_as="generator")(
            delayed(self.rows)(part) for part in parts
        )
        found: list[Rows] = []
        for rows in done:
            found.append(rows)
            told(sum(map(len, found)))
        return np.concatenate(found)

    @property
    def about(self) -> dict[str, Any]:
        return {**self.embedding.about, "repeated sentences": len(self.segments.places)}


def unit(rows: Any) -> Rows:
    """Rows of length 1; a row of zeros stays one."""
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
