"""Texts as the base model reads them: the mean over their tokens of a middle layer's hidden states.

    h(text) = mean over its first 128 tokens but one of the states after the middle layer
    e(text) = unit(V^T ((h - mean) / spread))    mean, spread, V (50 main directions): the sample's

The first token is left out, because models park there what says nothing of the text: its states are
many times as large as all others. The layers above the middle one are dropped, and what is left
ends in the model's last norm: the last layers speak of the next token more than of the text.
docs/discovery.md compares this with TF-IDF.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manylora.base import load_model, load_tokenizer
from manylora.discovery.options import DiscoveryOptions
from manylora.discovery.space import DIMENSIONS, Embedding, Rows, Tfidf, unit

TOKENS = 128
_BATCH_TOKENS = 4096
_TRIED, _TRIED_CHARACTERS = 32, 2000
Say = Callable[[str], None]


class HiddenStates:
    """A base model as a reader of texts; it is loaded when the first text is read.

    say: told from time to time how many texts have been read. layer: after which the states are
    taken; known once the model is loaded.
    """

    def __init__(self, model: str, say: Say = lambda text: None) -> None:
        self.name, self.say = model, say
        self.read = self.layer = 0

    def __call__(self, texts: Sequence[str]) -> Rows:
        """(texts, width of the model); zeros for an empty text."""
        ids = self._tokens(texts)
        width = int(self._model.config.hidden_size)
        found = np.zeros((len(texts), width), dtype=np.float32)
        order = sorted((i for i in range(len(texts)) if ids[i]), key=lambda i: len(ids[i]))
        while order:
            most = max(1, _BATCH_TOKENS // len(ids[order[-1]]))
            batch, order = order[-most:], order[:-most]
            found[batch] = self._means([ids[i] for i in batch])
            self.read += len(batch)
            self.say(f"{self.read:,} documents read by {self.name}")
        return found

    def seconds(self, texts: Sequence[str]) -> float:
        """About how long one of these texts takes, by trying some of them."""
        some = [
            texts[i][:_TRIED_CHARACTERS] for i in range(0, len(texts), len(texts) // _TRIED + 1)
        ]
        self(some[:1])
        started = time.perf_counter()
        self(some)
        self.read = 0
        return (time.perf_counter() - started) / len(some)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.name)

    @cached_property
    def _model(self) -> PreTrainedModel:
        """The lower half of the model."""
        self.say(f"loading {self.name}")
        on_gpu = torch.cuda.is_available()
        whole: Any = load_model(self.name, "bfloat16" if on_gpu else "float32")
        model: Any = whole.get_decoder()
        count = model.config.num_hidden_layers
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not stacks:
            raise RuntimeError(
                f"the {count} layers of {self.name} are not to be found, so its states cannot be "
                "read; use features=tfidf"
            )
        self.layer = max(1, count // 2)
        del stacks[0][self.layer :]
        return model.to("cuda") if on_gpu else model

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        options: dict[str, Any] = {"add_special_tokens": False, "truncation": True}
        return list(self._tokenizer(list(texts), max_length=TOKENS, **options)["input_ids"])

    @torch.inference_mode()
    def _means(self, ids: list[list[int]]) -> Rows:
        lengths = torch.tensor([len(own) for own in ids])
        padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
        for row, own in zip(padded, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        places = torch.arange(padded.shape[1])
        mask = places < lengths[:, None]
        counted = mask & ((places > 0) | (lengths[:, None] == 1))
        device = self._model.device
        states = self._model(
            input_ids=padded.to(device), attention_mask=mask.long().to(device), use_cache=False
        ).last_hidden_state
        total = states.float().cpu().masked_fill(~counted[..., None], 0.0).sum(1)
        means: Rows = (total / counted.sum(1, keepdim=True)).numpy()
        return means


class ModelEmbedding:
    """An `Embedding` (see space.py) of what the model reads, fitted to a sample."""

    def __init__(self, states: HiddenStates) -> None:
        self.states = states

    def fit(self, contents: Sequence[str]) -> Rows:
        states = self.states(contents)
        self.scaler = StandardScaler().fit(states)
        states = self.scaler.transform(states)
        _, lengths, directions = np.linalg.svd(states, full_matrices=False)
        self.directions = directions[:DIMENSIONS].T
        kept = (lengths[:DIMENSIONS] ** 2).sum() / max((lengths**2).sum(), 1e-12)
        self.kept = round(float(kept), 3)
        return unit(states @ self.directions)

    def rows(self, contents: Sequence[str]) -> Rows:
        return unit(self.scaler.transform(self.states(contents)) @ self.directions)

    @property
    def about(self) -> dict[str, Any]:
        return {
            "features": f"mean hidden state of {self.states.name} after layer {self.states.layer}",
            "tokens of a document": f"the first {TOKENS}",
            "dimensions": self.directions.shape[1],
            "variance kept": self.kept,
        }


def embeddings(
    options: DiscoveryOptions, model: str, seed: int, say: Say = lambda text: None
) -> Callable[[], Embedding]:
    """What makes the embedding that the options name, as often as `discover` needs a fresh one.

    model: read where `features` is "model", and loaded once for all of them.
    """
    if options.features == "tfidf":
        return lambda: Tfidf(seed)
    states = HiddenStates(model, say)
    return lambda: ModelEmbedding(states)
