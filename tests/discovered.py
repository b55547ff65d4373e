"""A `Discovery` as a corpus of instructions gives it: four clusters, or as many as asked for."""

from __future__ import annotations

from typing import Any

from manylora.discovery.result import (
    Agreement,
    Candidate,
    Central,
    Cluster,
    Criterion,
    Discovery,
    Heterogeneity,
)

FIELDS = {
    "legal": "clause contract party agreement termination governing law notice assign liability",
    "code": "bash command directory file recursively print find lines current folder",
    "banking": "card transfer payment account pending charged top-up refund atm cash",
    "medical": "patients study trial treatment placebo outcome cohort clinical dose risk",
    "finance": "shares quarter profit revenue market analyst stock dividend earnings index",
    "reviews": "film plot acting service restaurant boring wonderful awful loved cast",
}
TEXTS = {
    "legal": "Highlight the parts of this contract related to the governing law.\n\nThis Agreement "
    "shall be governed by the laws of the State of Delaware, without regard to conflicts.",
    "code": "Write a bash command: find all files in the current directory that are larger than "
    "10 MB and print them with their size, the largest first.",
    "banking": "Which intent has this customer? My card payment is still pending, why is that?",
    "medical": "Does this abstract support the claim? Patients in the treatment arm had a lower "
    "risk of relapse than those on placebo (hazard ratio 0.61).",
    "finance": "Is the headline about a rise? Quarterly revenue beat what analysts had expected.",
    "reviews": "Positive or negative? The plot is thin, but the acting is simply wonderful.",
}


def cluster(place: int, size: int) -> Cluster:
    """The cluster at this place, from 1; its subjects repeat when there are more than six."""
    subject = list(FIELDS)[(place - 1) % len(FIELDS)]
    terms = FIELDS[subject].split()
    central = [
        Central(source=f"{subject}_{place}.jsonl:{row}", task=subject, text=TEXTS[subject])
        for row in (12, 407, 33)
    ]
    return Cluster(name=f"{place}-{'-'.join(terms[:3])}", size=size, terms=terms, central=central)


def curve(k: int, most: int) -> list[Candidate]:
    """SSE with its bend at k, and silhouette and Davies-Bouldin best there."""
    points = [Candidate(k=1, sse=7105.2)]
    for tried in range(2, most + 1):
        beyond = max(0, tried - k)
        sse = 7105.2 * (1 - 0.4 * (min(tried, k) - 1) / max(k - 1, 1) - 0.006 * beyond)
        off = abs(tried - k) / most
        points.append(
            Candidate(k=tried, sse=sse, silhouette=0.31 - 0.4 * off, davies_bouldin=1.6 + 3 * off)
        )
    return points


def agreement(k: int, tasks: int, size: int = 270) -> Agreement:
    """Each task mostly in one cluster, a part of it in the next, two documents in none."""
    rows = {}
    subjects = list(FIELDS)
    for task in range(tasks):
        counts = [0] * (k + 1)
        home = (task * 7) % k
        counts[(home + 1) % k] += task % 5 * 12
        counts[home] += size - sum(counts) - 2
        counts[k] = 2
        rows[f"{subjects[task % len(subjects)]}_task_{task:02}"] = counts
    return Agreement(rows=rows, ari=0.871, nmi=0.912)


def discovered(k: int = 4, tasks: int = 5, **changes: Any) -> Discovery:
    """What was found in a corpus of that many tasks; 0: it names none. changes: other fields."""
    sizes = [1200 - 40 * i for i in range(k)]
    fields: dict[str, Any] = {
        "documents": sum(sizes) + 12,
        "apart": 12,
        "k": k,
        "chosen_by": "elbow",
        "disagreement": f"silhouette says {k + 2} and HDBSCAN 7; the elbow was taken.",
        "criteria": [
            Criterion(name="elbow", k=k),
            Criterion(name="silhouette", k=k + 2),
            Criterion(name="davies_bouldin", k=k),
            Criterion(name="dbscan", k=None, note="no radius separates the documents"),
            Criterion(name="hdbscan", k=7, note="38 % of the documents in none"),
        ],
        "curve": curve(k, max(20, k + 5)),
        "clusters": [cluster(i + 1, size) for i, size in enumerate(sizes)],
        "agreement": agreement(k, tasks) if tasks else None,
        "heterogeneity": Heterogeneity(
            share=0.412,
            control=0.031,
            silhouette=0.31,
            several=True,
            advice="The clusters are 13 times as far apart as in a shuffled corpus: try one "
            f"branch a cluster (num_branches: {k}) against a plain LoRA of the same size.",
        ),
        "settings": {
            "features": "tfidf",
            "vocabulary": 32768,
            "components": 128,
            "clusters_by": "k-means",
            "restarts": 10,
            "curve_documents": 4572,
            "seed": 0,
        },
        "seconds": {"features": 3.21, "curve": 14.8, "density": 6.02, "describe": 0.4},
    }
    return Discovery(**{**fields, **changes})


def one_cluster() -> Discovery:
    """A corpus in one piece: nothing to compare, nobody has an answer but the elbow."""
    return discovered(
        1,
        0,
        disagreement="",
        criteria=[Criterion(name="elbow", k=1), Criterion(name="silhouette", k=None)],
        curve=[Candidate(k=1, sse=12.5)],
        heterogeneity=Heterogeneity(
            share=0.0, control=0.0, silhouette=None, several=False, advice="One branch is enough."
        ),
    )
