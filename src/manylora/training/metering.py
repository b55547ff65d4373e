"""The electricity of a run's training, where its recipe asks for it (`train: {energy: true}`).

CodeCarbon measures or estimates it (manylora/energy.py says how good that is); without the key
nothing is measured, and nothing is said. It covers the training steps of one process, all its
sessions where the run was stopped and resumed, but not steps that were lost and done again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from manylora.energy import PARTS, EnergyMeter, energy_meter, require_codecarbon
from manylora.training.ranks import several_processes


class EnergyMixin:
    """Left of a transformers trainer class: `kwh`, which `metering` fills.

    kwh_before: of the sessions before this one, for a resumed run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.meter: EnergyMeter | None = None
        self.kwh_before: dict[str, float] = {}
        super().__init__(*args, **kwargs)

    @property
    def kwh(self) -> dict[str, float]:
        """kWh of cpu, gpu and ram up to a second ago; empty where nothing is measured."""
        if self.meter is None:
            return {}
        return {part: self.kwh_before.get(part, 0.0) + self.meter.so_far[part] for part in PARTS}


def check_energy(wanted: bool) -> None:
    """Raise RuntimeError, before the work, where energy is asked for and cannot be measured."""
    if not wanted:
        return
    require_codecarbon()
    if several_processes():
        raise RuntimeError(
            "train.energy=true measures one process and its GPU, and this run has several; leave "
            "it out, or train with one process"
        )


@contextmanager
def metering(trainer: EnergyMixin, device: Any, wanted: bool) -> Iterator[None]:
    """Measure what the block takes on `device`, if it is wanted."""
    if not wanted:
        yield
        return
    with energy_meter(device) as trainer.meter:
        yield


def energy_of(trainer: EnergyMixin) -> dict[str, Any] | None:
    """For summary.json: kwh by part, and of each whether it is measured, by what, and what it
    covers; or the error that kept it from being known. None where nothing was asked for."""
    if trainer.meter is None:
        return None
    try:
        found = trainer.meter.energy
    except RuntimeError as error:  # the training is done, and worth keeping without it
        return {"error": str(error)}
    return {
        "kwh": trainer.kwh,
        "measured": found.measured,
        "how": found.how,
        "covers": found.covers,
    }
