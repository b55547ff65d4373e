"""How to look for tasks: the recipe's `discovery` keys and the options of `manylora discover`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_SAMPLE = {"tfidf": 20_000, "model": 2_000}


class DiscoveryOptions(BaseModel):
    """features: TF-IDF, or the base model's mean hidden state (slower). clusters: how many, instead
    of finding it out. max_clusters: how far the curve is drawn. sample: rows from which all is
    learned, default 20,000, or 2,000 where the model reads them; the others are put to the nearest
    cluster."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    features: Literal["tfidf", "model"] = "tfidf"
    clusters: int | None = Field(None, ge=1)
    max_clusters: int = Field(32, ge=2)
    sample: int | None = Field(None, ge=10)

    @property
    def learned_from(self) -> int:
        """The most rows that all is learned from."""
        return self.sample or _SAMPLE[self.features]
