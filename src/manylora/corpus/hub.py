"""Rows of a data set on the Hugging Face hub, streamed through the `datasets` library.

    owner/name                    the data set's only configuration
    owner/name/config             one of several configurations
    owner/name@revision           pinned: a commit, tag or branch

`trust_remote_code` is never given: a data set that is a program is refused by the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from huggingface_hub import HfApi

from manylora.corpus.json_rows import Rows
from manylora.corpus.layouts import CorpusError, Example, Fields
from manylora.corpus.readers import examples_of
from manylora.corpus.rows import RowReader

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?")


@dataclass(frozen=True, slots=True)
class HubName:
    """A data set's name, taken apart."""

    path: str
    config: str | None = None
    revision: str | None = None


def parse_hub_name(name: str) -> HubName:
    """owner/name[/config][@revision], or a local folder that `datasets` can read."""
    if Path(name).is_dir():
        return HubName(name)
    match = _NAME.fullmatch(name)
    if match is None:
        raise CorpusError(
            f"{name!r} is no data set on the hub. Give owner/name, owner/name/config or "
            "owner/name@revision."
        )
    return HubName(match[1], match[2], match[3])


def is_hub_name(name: str) -> bool:
    """Whether a recipe's `data` is a name on the hub: no path of this machine, and in its form."""
    return _NAME.fullmatch(name) is not None and not Path(name).exists()


def pinned(name: str) -> str:
    """The same data set with the commit that the hub has now: owner/name[/config]@commit."""
    hub = parse_hub_name(name)
    if hub.revision is not None and _COMMIT.fullmatch(hub.revision):
        return name
    try:
        commit = HfApi().dataset_info(hub.path, revision=hub.revision).sha
    except Exception as error:
        raise _unreachable(name, error) from error
    return f"{hub.path}{f'/{hub.config}' if hub.config else ''}@{commit}"


def hub_splits(name: str) -> list[str]:
    """The names of a data set's splits, as "train" and "test"."""
    hub = parse_hub_name(name)
    try:
        return list(datasets.get_dataset_split_names(hub.path, hub.config, revision=hub.revision))
    except Exception as error:
        raise _unreachable(name, error) from error


def read_hub(
    name: str,
    fields: Fields | None = None,
    split: str = "train",
    task: str | None = None,
    answered: bool = True,
    unread: set[str] | None = None,
) -> Iterator[Example | CorpusError]:
    """Each row of a split, in order, as an example or as the reason why it is none.

    task: the task of all rows unless `fields.task` names a column; else the data set's name.
    unread: gets the names of the columns that are not read.

    Raises CorpusError when the data set cannot be reached, or not to its end.
    """
    own = task if task is not None else parse_hub_name(name).path.rstrip("/").split("/")[-1]
    reader = RowReader(f"{name}:{split}", fields or Fields(), own, answered, table=True)
    reader.unread = unread if unread is not None else reader.unread
    yield from examples_of(_rows(name, split, reader), reader)


def _rows(name: str, split: str, reader: RowReader) -> Rows:
    hub = parse_hub_name(name)
    number = 0
    try:
        rows = datasets.load_dataset(
            hub.path, hub.config, split=split, revision=hub.revision, streaming=True
        )
        if rows.column_names is not None:
            rows = rows.select_columns(reader.header(rows.column_names).columns)
        for row in rows:
            number += 1
            yield number, row
    except CorpusError:
        raise
    # What a script, a file system or a decoder of any format may raise is without end.
    except Exception as error:
        raise _unreachable(f"{name}:{split}", error, number) from error


def _unreachable(what: str, error: Exception, rows: int = 0) -> CorpusError:
    reason = " ".join(str(error).split())[:300]
    after = f" after row {rows}" if rows else ""
    return CorpusError(
        f"{what}: no file or folder here has that name, and the data set on the hub cannot be "
        f"read{after}: {type(error).__name__}: {reason}. Check the path; or the data set's name "
        "and split, and the network or HF_HUB_OFFLINE; of a private one, `hf auth login`."
    )
