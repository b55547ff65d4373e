"""What picks the branch of a prompt when nobody says which: the nearest centroid of token counts.

A prompt is the bag of its token ids, hashed into `buckets` and weighted

    f = log(1 + count) * idf,  idf = log((1 + n) / (1 + df)),  f / |f|

and compared by cosine with one centroid per branch, after the mean of the branches is taken from
both: what all branches have in common says nothing, and tokens that every prompt has (a chat
template) weigh nothing at all. A prompt less like its nearest branch than that branch's threshold
gets -1: the shared branch alone. The threshold is a quantile of the similarity of the branch's own
training prompts, each against a centroid that was made without it. It reads token ids, so it works
inside a model's forward pass, needs no tokenizer, and is deterministic: an answer depends neither
on the rest of the batch nor on the number of threads. Saved as `branch_selector.safetensors` beside
the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from manylora.adapter.centroids import (
    CHUNK,
    Numbers,
    branch_means,
    centroids_of,
    cosines,
    count_prompts,
    count_tokens,
    inverse_frequency,
    thresholds_of,
    weigh,
)

SELECTOR_FILE = "branch_selector.safetensors"
_TENSORS = ("idf", "mean", "centroids", "thresholds")


@dataclass
class BranchSelector:
    """Chooses a branch id from the token ids of a prompt.

    idf: (buckets,); mean: (buckets,) of the branches' features; centroids: (N, buckets), unit rows,
    without the mean; thresholds: (N,), the cosine below which a branch is not chosen; names: what
    each branch is for, in order.
    """

    idf: Tensor
    mean: Tensor
    centroids: Tensor
    thresholds: Tensor
    names: list[str]

    @classmethod
    def fit(
        cls,
        prompts: Sequence[Sequence[int]],
        branches: Sequence[int],
        names: Sequence[str],
        buckets: int = 8192,
        refuse: float = 0.01,
    ) -> BranchSelector:
        """Fit to prompts (token ids) whose branch is known; every branch needs a prompt.

        refuse: the share of a branch's own prompts that may get -1, for prompts that are drawn as
        these were; prompts worded in another way get it more often.
        """
        owner = _owners(branches, names, refuse)
        counts = count_prompts(prompts, buckets)
        idf = inverse_frequency(counts)
        features = weigh(counts, idf)
        mean = np.zeros(buckets, dtype=np.float32)
        if len(names) > 1:  # one branch is all there is: without its mean nothing would be left
            mean = branch_means(features, owner, len(names)).mean(0)
        return cls(
            torch.from_numpy(idf),
            torch.from_numpy(mean),
            torch.from_numpy(centroids_of(features, owner, len(names), mean)),
            torch.from_numpy(thresholds_of(features, owner, mean, refuse, np.empty(0, np.float32))),
            list(names),
        )

    def extended(
        self,
        prompts: Sequence[Sequence[int]],
        branches: Sequence[int],
        names: Sequence[str],
        refuse: float = 0.01,
    ) -> BranchSelector:
        """This selector with new branches after its own; `branches` are places in `names`.

        The weights of tokens and all that is known of the old branches stay, so a prompt of an old
        branch goes where it went unless it is more like a new one.
        """
        owner = _owners(branches, names, refuse)
        known = [name for name in names if name in self.names]
        if known:
            raise ValueError(f"the selector already has a branch for {', '.join(known)}")
        mean, known_thresholds = self.mean.numpy(), self.thresholds.numpy()
        features = weigh(count_prompts(prompts, self.idf.numel()), self.idf.numpy())
        centroids = centroids_of(features, owner, len(names), mean)
        thresholds = thresholds_of(features, owner, mean, refuse, known_thresholds)
        return BranchSelector(
            self.idf,
            self.mean,
            torch.cat([self.centroids, torch.from_numpy(centroids)]),
            torch.cat([self.thresholds, torch.from_numpy(thresholds)]),
            [*self.names, *names],
        )

    @property
    def size(self) -> int:
        """How many numbers it stores."""
        return sum(int(getattr(self, name).numel()) for name in _TENSORS)

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
        chosen = torch.empty(len(ids), dtype=torch.long)
        for start in range(0, len(ids), CHUNK):
            some = slice(start, start + CHUNK)
            lengths = mask[some].sum(1).numpy()
            chosen[some] = torch.from_numpy(self._chosen(ids[some][mask[some]].numpy(), lengths))
        return chosen

    def choose(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """A branch id for each prompt (token ids), -1 for the shared branch alone; as `select`."""
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        ids = pad_sequence([torch.tensor(prompt, dtype=torch.long) for prompt in prompts], True)
        return [int(i) for i in self.select(ids, torch.arange(ids.shape[1]) < lengths)]

    def _chosen(self, ids: Numbers, lengths: Numbers) -> Numbers:
        features = weigh(count_tokens(ids, lengths, self.idf.numel()), self.idf.numpy())
        similarity = cosines(features, self.mean.numpy(), self.centroids.numpy())
        branch = similarity.argmax(1)
        near = similarity.max(1) >= self.thresholds.numpy()[branch]
        return np.where(near, branch, -1)

    def save(self, path: Path) -> None:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        save_file(tensors, str(path), metadata={f"name_{i}": n for i, n in enumerate(self.names)})

    @classmethod
    def load(cls, path: Path) -> BranchSelector:
        """Read what `save` wrote; ValueError for a file of another form."""
        with safe_open(str(path), framework="pt") as file:
            if set(file.keys()) != set(_TENSORS):
                raise ValueError(
                    f"{path} holds {', '.join(sorted(file.keys()))}, but a selector is "
                    f"{', '.join(_TENSORS)}: another version of manylora wrote it; train again, "
                    "or use that version"
                )
            metadata = file.metadata() or {}
            idf, mean, centroids, thresholds = (file.get_tensor(name) for name in _TENSORS)
            names = [metadata[f"name_{i}"] for i in range(len(centroids))]
            return cls(idf, mean, centroids, thresholds, names)

    @classmethod
    def load_beside(
        cls, adapter: str, subfolder: str | None, revision: str | None
    ) -> BranchSelector:
        """Load the selector saved in an adapter's folder or hub repository."""
        file = Path(adapter) / (subfolder or "") / SELECTOR_FILE
        if not file.is_file():
            if file.parent.is_dir():
                raise missing_selector(str(file.parent))
            try:
                found = hf_hub_download(
                    adapter, SELECTOR_FILE, subfolder=subfolder, revision=revision
                )
            except RemoteEntryNotFoundError as error:
                raise missing_selector(adapter) from error
            file = Path(found)
        return cls.load(file)


def missing_selector(where: str) -> ValueError:
    if not where:
        return ValueError(
            "the configuration has selector=True, but no selector, as PeftConfig.from_pretrained "
            "reads none: leave out config=, or use ManyLoraConfig.from_pretrained"
        )
    return ValueError(
        f"the adapter {where} chooses its branch by a selector, but {SELECTOR_FILE} is not beside "
        "its weights; copy the whole adapter folder, or load it with PeftModel.from_pretrained "
        "without config= or with that of ManyLoraConfig.from_pretrained"
    )


def _owners(branches: Sequence[int], names: Sequence[str], refuse: float) -> Numbers:
    """The branches of the prompts, when they can be learned."""
    if not 0 <= refuse < 1:
        raise ValueError(f"refuse={refuse}: a share of own prompts is from 0 to below 1")
    present = set(branches)
    missing = [name for i, name in enumerate(names) if i not in present]
    if missing:
        raise ValueError(f"no training prompt for {', '.join(missing)}: cannot select it")
    return np.array(branches, dtype=np.int64)
