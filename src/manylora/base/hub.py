"""Models of the hub by name and revision: "owner/name" or "owner/name@revision".

A revision is a branch, a tag or a commit; none is the branch main. Only a commit means the same
tomorrow, so that is what a saved recipe holds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from manylora.base.converted import BaseModelError

_NAME = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(\w[\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubModel(NamedTuple):
    name: str
    revision: str | None


def parse(model: str) -> HubModel | None:
    """The name and the revision in a hub name; None for what cannot be one."""
    match = _NAME.fullmatch(model)
    return HubModel(match[1], match[2]) if match else None


def commit_of(hub: HubModel) -> str:
    """The commit that the revision is at now; without a network, when it was last fetched.

    Raises BaseModelError when neither the hub nor its cache knows the model or the revision.
    """
    if hub.revision is not None and _COMMIT.fullmatch(hub.revision):
        return hub.revision
    try:
        config = hf_hub_download(hub.name, "config.json", revision=hub.revision)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise BaseModelError(
            f"cannot find out the commit of model={written(hub)!r}: {reason(error)}\n{advice(hub)}"
        ) from None
    return Path(config).parent.name


def reason(error: Exception) -> str:
    """The first line of what the hub's client says; the rest is about its own arguments."""
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no model of that name, or it is private and you are not logged in."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


def written(hub: HubModel) -> str:
    return hub.name if hub.revision is None else f"{hub.name}@{hub.revision}"


def advice(hub: HubModel) -> str:
    """What someone whose hub model did not load can do, with what the hub cache has of it."""
    known = known_revisions(hub.name)
    if known:
        here = f"The hub cache has {hub.name} at: {', '.join(known)}."
    else:
        here = f"The hub cache has nothing of {hub.name}."
    if hub_constants.HF_HUB_OFFLINE:
        return (
            f"{here} HF_HUB_OFFLINE is set, so only models already in the hub cache can be used: "
            "unset it"
        )
    revision = "" if hub.revision is None else ", the revision"
    return (
        f"{here} Check the name{revision} and the network (with HF_HUB_OFFLINE=1 only the hub "
        "cache is asked)"
    )


def known_revisions(name: str) -> list[str]:
    """The revisions of a model in the hub cache: "main (1a2b3c...)", or a bare commit."""
    folder = Path(hub_constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    refs = {
        str(ref.relative_to(folder / "refs")): ref.read_text(encoding="utf-8").strip()
        for ref in sorted((folder / "refs").rglob("*"))
        if ref.is_file()
    }
    commits = sorted(entry.name for entry in (folder / "snapshots").glob("*") if entry.is_dir())
    bare = [commit for commit in commits if commit not in refs.values()]
    return [f"{ref} ({commit})" for ref, commit in refs.items()] + bare


def cached_snapshot(hub: HubModel) -> Path | None:
    """The folder of the hub cache with config and weights of the model; None if any is missing."""
    config = _cached(hub, "config.json")
    index = _cached(hub, "model.safetensors.index.json")
    weights = {"model.safetensors"}
    if index is not None:
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if config is None or any(_cached(hub, file) is None for file in weights):
        return None
    return config.parent


def _cached(hub: HubModel, file: str) -> Path | None:
    found = try_to_load_from_cache(hub.name, file, revision=hub.revision)
    return Path(found) if isinstance(found, str) else None
