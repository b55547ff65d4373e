"""Data: task files read, encoded and mixed."""

from __future__ import annotations

from manylora.corpus.encode import (
    Collator,
    Encoded,
    Row,
    TooLongError,
    dataset_rows,
    encode,
    encode_all,
    prompt_ids,
)
from manylora.corpus.formats import (
    Corpus,
    CorpusError,
    Example,
    load_corpus,
    read_prompts,
    read_tasks,
    samples_path,
)
from manylora.corpus.mixture import (
    MixtureRow,
    Strategy,
    mixture_table,
    print_mixture,
    sample_order,
)

__all__ = [
    "Collator",
    "Corpus",
    "CorpusError",
    "Encoded",
    "Example",
    "MixtureRow",
    "Row",
    "Strategy",
    "TooLongError",
    "dataset_rows",
    "encode",
    "encode_all",
    "load_corpus",
    "mixture_table",
    "print_mixture",
    "prompt_ids",
    "read_prompts",
    "read_tasks",
    "sample_order",
    "samples_path",
]
