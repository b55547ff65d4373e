"""Data: files read, checked, split, mixed, encoded and put into batches."""

from __future__ import annotations

from manylora.corpus.batches import IGNORED, Collator, Row, dataset_of
from manylora.corpus.encode import Encoded, Encoder, TooLongError
from manylora.corpus.layouts import CorpusError, Example, Fields, Message
from manylora.corpus.mixture import DrawOrder, Mixture, shares
from manylora.corpus.origins import Data, absolute, samples_path
from manylora.corpus.readers import read_examples, task_files
from manylora.corpus.split import Corpus, DataOptions, load_corpus, read_rows
from manylora.corpus.store import Rows
from manylora.corpus.table import MixtureRow, mixture_table, print_mixture

__all__ = [
    "IGNORED",
    "Collator",
    "Corpus",
    "CorpusError",
    "Data",
    "DataOptions",
    "DrawOrder",
    "Encoded",
    "Encoder",
    "Example",
    "Fields",
    "Message",
    "Mixture",
    "MixtureRow",
    "Row",
    "Rows",
    "TooLongError",
    "absolute",
    "dataset_of",
    "load_corpus",
    "mixture_table",
    "print_mixture",
    "read_examples",
    "read_rows",
    "samples_path",
    "shares",
    "task_files",
]
