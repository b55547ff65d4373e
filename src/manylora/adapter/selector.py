"""What picks the branch of a prompt when nobody says which: the nearest centroid of token counts.

A prompt is the bag of its token ids and of its neighbouring pairs, hashed into `buckets`, weighted

    f = log(1 + count) * idf,  idf = log((1 + n) / (1 + df)),  f / |f|

and compared by cosine with one centroid per branch. Tokens that every prompt has (a chat template)
weigh nothing. A prompt less like every branch than any training prompt was like the others of its
own gets -1: the shared branch alone. It reads token ids, so it works inside a model's forward
pass, needs no tokenizer, and is deterministic. Saved as `branch_selector.safetensors` beside the
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SELECTOR_FILE = "branch_selector.safetensors"


@dataclass
class BranchSelector:
    """Chooses a branch id from the token ids of a prompt.

    idf: (buckets,); centroids: (N, buckets), unit rows; threshold: cosine below which the answer
    is -1; names: what each branch is for, in order.
    """

    idf: Tensor
    centroids: Tensor
    threshold: float
    names: list[str]

    @classmethod
    def fit(
        cls,
        prompts: Sequence[Sequence[int]],
        branches: Sequence[int],
        names: Sequence[str],
        buckets: int = 8192,
    ) -> BranchSelector:
        """Fit to prompts (token ids) whose branch is known; every branch needs a prompt."""
        _refuse_missing(branches, names)
        counts = torch.stack([_counts(torch.tensor(p), buckets) for p in prompts])
        idf = torch.log((1 + len(prompts)) / (1 + (counts > 0).sum(0)))
        centroids, threshold = _centroids(_unit(torch.log1p(counts) * idf), branches, len(names))
        return cls(idf, centroids, threshold, list(names))

    def extended(
        self, prompts: Sequence[Sequence[int]], branches: Sequence[int], names: Sequence[str]
    ) -> BranchSelector:
        """This selector with new branches after its own; `branches` are places in `names`.

        The weights of tokens and the known centroids stay, so a prompt of a known branch goes where
        it went unless it is more like a new one. The threshold is the lower one of both.
        """
        _refuse_missing(branches, names)
        known = [name for name in names if name in self.names]
        if known:
            raise ValueError(f"the selector already has a branch for {', '.join(known)}")
        counts = [_counts(torch.tensor(p), self.idf.numel()) for p in prompts]
        features = _unit(torch.log1p(torch.stack(counts)) * self.idf)
        centroids, threshold = _centroids(features, branches, len(names))
        return BranchSelector(
            self.idf,
            torch.cat([self.centroids, centroids]),
            min(self.threshold, threshold),
            [*self.names, *names],
        )

    def select(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Branch ids (batch,) for prompts (batch, tokens); mask is true where a prompt's token is.

        Raises ValueError when a prompt has no token, because nothing can be chosen from nothing.
        """
        ids, mask = input_ids.cpu(), mask.cpu().bool()
        if not bool(mask.any(1).all()):
            raise ValueError(
                "a prompt is empty, so no branch can be selected for it; "
                "say which with manylora.branch_ids(model, ids)"
            )
        rows = [_counts(row[keep], self.idf.numel()) for row, keep in zip(ids, mask, strict=True)]
        features = _unit(torch.log1p(torch.stack(rows)) * self.idf)
        similarity, branch = (features @ self.centroids.T).max(1)
        return torch.where(similarity >= self.threshold, branch, -1)

    def save(self, path: Path) -> None:
        tensors = {
            "idf": self.idf,
            "centroids": self.centroids,
            "threshold": torch.tensor([self.threshold], dtype=torch.float64),
        }
        save_file(tensors, str(path), metadata={f"name_{i}": n for i, n in enumerate(self.names)})

    @classmethod
    def load(cls, path: Path) -> BranchSelector:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            idf, centroids = file.get_tensor("idf"), file.get_tensor("centroids")
            names = [metadata[f"name_{i}"] for i in range(len(centroids))]
            return cls(idf, centroids, float(file.get_tensor("threshold")), names)

    @classmethod
    def load_beside(
        cls, adapter: str, subfolder: str | None, revision: str | None
    ) -> BranchSelector:
        """Load the selector saved in an adapter's folder or hub repository."""
        folder = Path(adapter) / (subfolder or "")
        if (folder / SELECTOR_FILE).is_file():
            return cls.load(folder / SELECTOR_FILE)
        if not folder.is_dir():
            try:
                return cls.load(
                    Path(
                        hf_hub_download(
                            adapter, SELECTOR_FILE, subfolder=subfolder, revision=revision
                        )
                    )
                )
            except Exception as error:
                raise missing_selector(adapter) from error
        raise missing_selector(str(folder))


def missing_selector(where: str) -> ValueError:
    return ValueError(
        f"the adapter {where} chooses its branch by a selector, but {SELECTOR_FILE} is not beside "
        "its weights; copy the whole adapter folder, or load it with PeftModel.from_pretrained"
    )


def _refuse_missing(branches: Sequence[int], names: Sequence[str]) -> None:
    missing = [name for i, name in enumerate(names) if i not in set(branches)]
    if missing:
        raise ValueError(f"no training prompt for {', '.join(missing)}: cannot select it")


def _centroids(features: Tensor, branches: Sequence[int], count: int) -> tuple[Tensor, float]:
    """Unit rows, one for each branch, and the cosine that every prompt has to its own branch."""
    owner = torch.tensor(branches)
    sums = torch.zeros(count, features.shape[1]).index_add_(0, owner, features)
    # Each prompt against the others of its branch: a centroid is biased towards its members.
    others = (features * _unit(sums[owner] - features)).sum(1)
    others = others[torch.bincount(owner)[owner] > 1]
    return _unit(sums), max(float(others.min()) if len(others) else 0.0, 1e-6)


def _counts(ids: Tensor, buckets: int) -> Tensor:
    pairs = (ids[:-1] * 1_000_003 + ids[1:] * 31 + 7) % buckets
    return torch.bincount(torch.cat([ids % buckets, pairs]), minlength=buckets).float()


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-12)
