"""Discovery from texts to clusters: sample, space, curve, choice, and every document's cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manylora.corpus.layouts import CorpusError
from manylora.discovery import describe
from manylora.discovery.choice import choose, criteria, disagreement
from manylora.discovery.curve import Curve, Tree, cluster, measure, some
from manylora.discovery.density import density
from manylora.discovery.documents import readable
from manylora.discovery.heterogeneity import heterogeneity
from manylora.discovery.options import DiscoveryOptions
from manylora.discovery.result import Cluster, Criterion, Discovery
from manylora.discovery.space import Embedding, Rows, Space, Tfidf, unit

_CURVE_ROWS, _TERM_ROWS = 10_000, 50_000
Say = Callable[[str], None]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Clusters:
    """What puts a text into a cluster: its place in the space and the centres (K, dimensions)."""

    space: Space
    centres: Rows

    def assign(self, texts: Sequence[str], say: Say) -> tuple[Labels, npt.NDArray[np.float32]]:
        """(cluster from 0, cosine to its centre) of each text; -1 where nothing can be read."""
        words = readable(texts)
        labels = np.full(len(texts), -1, dtype=np.int32)
        similarity = np.zeros(len(texts), dtype=np.float32)
        able = np.flatnonzero(words)
        if len(able):
            said = f"of {len(able):,} rows assigned"
            rows = self.space.in_parts(
                [texts[int(i)] for i in able], lambda done: say(f"{done:,} {said}")
            )
            labels[able], similarity[able] = nearest(rows, self.centres)
        return labels, similarity


@dataclass(frozen=True)
class Found:
    """A discovery, the clusters behind it, and each document's cluster and closeness to it."""

    discovery: Discovery
    clusters: Clusters
    labels: Labels
    similarity: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Documents:
    """What is clustered: of each row its text, the task it is filed under, where it stands."""

    texts: Sequence[str]
    tasks: Sequence[str]
    sources: Sequence[str]


@dataclass(frozen=True)
class _Learned:
    """What the sample gave: its texts, their rows, the space, the curve over some of the rows."""

    sample: list[str]
    rows: Rows
    space: Space
    curve: Curve
    criteria: list[Criterion]


def discover(
    documents: Documents,
    options: DiscoveryOptions,
    seed: int,
    embedding: Callable[[], Embedding] | None = None,
    say: Say = lambda text: None,
) -> Found:
    """Find the clusters of some documents.

    embedding: makes what turns a text into numbers; default TF-IDF. say: told what is being done.

    Raises CorpusError when there is nothing to read, or fewer documents than clusters asked for.
    """
    embedding = embedding or (lambda: Tfidf(seed))
    timer = _Timer(say)
    learned = _learn(documents.texts, options, seed, embedding(), timer)
    chosen = choose(learned.criteria)
    if options.clusters is not None:
        chosen = Criterion(name="given", k=options.clusters)
    k = chosen.k or 1
    with timer("clustering"):
        tree = learned.curve.tree
        one = learned.rows.mean(0, keepdims=True)
        centres = one if tree is None or k == 1 else _centres(learned.rows, k, seed, tree)
    with timer("assigning every row"):
        labels, similarity = Clusters(learned.space, centres).assign(documents.texts, say)
    order = np.argsort(-np.bincount(labels[labels >= 0], minlength=k), kind="stable")
    labels = np.append(np.argsort(order), -1)[labels].astype(np.int32)
    with timer("the shuffled control"):
        own = nearest(learned.rows, centres)[0]
        parts = heterogeneity(learned.sample, learned.rows, own, seed, embedding())
    with timer("describing the clusters"):
        shown = _described(documents, labels, similarity, k, seed)
        agreed = describe.agreement(documents.tasks, labels, k)
    discovery = Discovery(
        documents=len(labels),
        apart=int((labels < 0).sum()),
        k=k,
        chosen_by=chosen.name,
        disagreement=disagreement(k, learned.criteria),
        criteria=learned.criteria,
        curve=learned.curve.candidates,
        clusters=shown,
        agreement=agreed,
        heterogeneity=parts,
        settings=_settings(learned, len(labels), seed),
        seconds=timer.seconds,
    )
    return Found(discovery, Clusters(learned.space, centres[order]), labels, similarity)


def _learn(
    texts: Sequence[str], options: DiscoveryOptions, seed: int, embedding: Embedding, timer: _Timer
) -> _Learned:
    able = np.flatnonzero(readable(texts))
    if not len(able):
        raise CorpusError(
            f"none of the {len(texts):,} prompts has a letter or a digit, so there is nothing to "
            "find in them"
        )
    picked = np.sort(np.random.default_rng(seed).permutation(able)[: options.learned_from])
    sample = [texts[i] for i in picked]
    space = Space(embedding)
    with timer("reading the documents"):
        rows = space.fit(sample)
    few = some(rows, _CURVE_ROWS, seed)
    different = len(np.unique(few.round(4), axis=0))
    wanted = options.clusters or 1
    if wanted > different:
        raise CorpusError(
            f"{wanted} clusters are asked for, but the {len(texts):,} documents differ in only "
            f"{different:,} ways; ask for at most {different:,}, or leave it to the curve"
        )
    most = min(max(options.max_clusters, wanted), different)
    with timer("measuring the curve"):
        curve = measure(few, most, seed, lambda k: timer.say(f"the curve: K = {k} of {most}"))
    with timer("density"):
        found = [*criteria(curve), *density(few, seed)]
    return _Learned(sample, rows, space, curve, found)


def _centres(rows: Rows, k: int, seed: int, tree: Tree) -> Rows:
    return np.asarray(cluster(rows, k, seed, tree).cluster_centers_, dtype=np.float32)


def nearest(rows: Rows, centres: Rows) -> tuple[Labels, npt.NDArray[np.float32]]:
    """(place of the nearest centre, cosine to it) of each row."""
    distances = (centres**2).sum(1)[None] - 2 * rows @ centres.T
    labels = distances.argmin(1).astype(np.int32)
    return labels, (rows * unit(centres)[labels]).sum(1)


def _described(
    documents: Documents, labels: Labels, similarity: npt.NDArray[np.float32], k: int, seed: int
) -> list[Cluster]:
    picked = np.sort(np.random.default_rng(seed).permutation(len(labels))[:_TERM_ROWS])
    terms = describe.top_terms([documents.texts[i] for i in picked], labels[picked], k)
    centrals = [
        describe.central(
            documents.texts, documents.sources, documents.tasks, similarity, labels, number
        )
        for number in range(k)
    ]
    return describe.clusters(terms, labels, centrals)


def _settings(learned: _Learned, documents: int, seed: int) -> dict[str, Any]:
    curve = learned.curve.candidates
    measured = min(len(learned.rows), _CURVE_ROWS)
    return {
        **learned.space.about,
        "learned from": f"{len(learned.sample):,} of {documents:,} documents",
        "curve": f"{measured:,} documents, K up to {curve[-1].k}",
        "clustering": "K-means, started from Ward's tree and from two random draws",
        "seed": seed,
    }


class _Timer:
    """Says what is being done and keeps how long it took."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self.say(what)
        started = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - started, 2)
