"""What discovery found, in the terms of `discovery.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

DISCOVERY_FILE = "discovery.json"
ASSIGNMENTS_FILE = "assignments.parquet"
FORMAT = 1


class Part(BaseModel):
    """A part of what was found; values are final."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(Part):
    """K-means with k clusters, on the documents that the curve was measured on.

    sse: sum of squared distances to the nearest centre (paper, section 3.2.1). silhouette: -1 to 1,
    higher is better; davies_bouldin: 0 up, lower is better. Both need two clusters.
    """

    k: int
    sse: float
    silhouette: float | None = None
    davies_bouldin: float | None = None


class Criterion(Part):
    """What one criterion says of the number of clusters; None where it finds no answer.

    note: what else there is to say, as how many documents DBSCAN leaves out.
    """

    name: str
    k: int | None
    note: str = ""


class Central(Part):
    """A document near the centre of its cluster."""

    source: str
    task: str
    text: str


class Cluster(Part):
    """One cluster; the number of `name` is its place, from 1, largest cluster first."""

    name: str
    size: int
    terms: list[str]
    central: list[Central]


class Agreement(Part):
    """Clusters against the tasks that the data name; only where they name several.

    rows: task -> documents in each cluster, and last those in none. ari, nmi: adjusted Rand index
    and normalised mutual information, 1 where both say the same, 0 (ari) by chance.
    """

    rows: dict[str, list[int]]
    ari: float
    nmi: float


class Heterogeneity(Part):
    """Whether the corpus falls into parts at all.

    share: of the documents' variance, what lies between the clusters. control: the same for as many
    clusters in a corpus whose words are shuffled over its documents. silhouette: of the clusters,
    None where there is one. several: whether more than one branch is worth trying; advice: that in
    words.
    """

    share: float
    control: float
    silhouette: float | None
    several: bool
    advice: str


class Discovery(Part):
    """Everything that `manylora discover` says.

    documents: how many rows. apart: rows without a cluster, because nothing can be read in them.
    k: the number of clusters; chosen_by: the criterion, or "given". disagreement: the criteria that
    say otherwise, in words; empty where all agree. settings: how features were made and clusters
    found, in words and numbers. seconds: by step.
    """

    format: int = FORMAT
    documents: int
    apart: int
    k: int
    chosen_by: str
    disagreement: str
    criteria: list[Criterion]
    curve: list[Candidate]
    clusters: list[Cluster]
    agreement: Agreement | None
    heterogeneity: Heterogeneity
    settings: dict[str, Any]
    seconds: dict[str, float]

    @property
    def names(self) -> list[str]:
        return [cluster.name for cluster in self.clusters]

    @property
    def branches(self) -> int:
        """How many branches the corpus is worth: one where it hardly falls into parts."""
        return self.k if self.heterogeneity.several else 1


def read_discovery(folder: Path) -> Discovery:
    """What an earlier `manylora discover --output FOLDER` found.

    Raises FileNotFoundError when the folder holds none.
    """
    path = folder / DISCOVERY_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {DISCOVERY_FILE}; make one with "
            f"`manylora discover DATA --output {folder}`"
        )
    return Discovery.model_validate_json(path.read_text(encoding="utf-8"))
