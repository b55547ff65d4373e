"""Energy and time of a piece of work, in kWh for CPU, GPU and RAM, by CodeCarbon, offline.

    energy(part) = sum over samples of power(part) x time, or the difference of an energy counter

These are the parts of HydraLoRA's table 4 (arXiv 2404.19245), which CodeCarbon measured too. It
says electricity alone: what a kWh emits depends on where it is made, which nobody asked about.

    part  where from, in CodeCarbon's order             measured  covers
    cpu   RAPL, Windows EMI, Power Gadget, ...          yes       machine
          else watts at full load x share of CPU time   no        process and its children
    gpu   NVML's (AMD SMI's) energy counter, or power   yes       machine: all that runs on that GPU
    ram   watts of the DIMMs that would hold the memory no        process and its children

Work side by side (`parallel` above 1): a counter that covers the machine counts all of it, once for
each run; such parts are in `Energy.shared`, and are not to be summed over the runs. RAPL cannot
tell processes apart, so the CPU is then estimated by process; no GPU counter can, and nothing
estimates it. Meters inside one another, and threads, share the process: the outer has the inner's.

What the estimates get wrong: the CPU's watts are those of whole CPUs, also where a virtual machine
has a few of their threads; a process is charged for two DIMMs at least (10 W on x86), so side by
side the RAM is charged too often; a child that lived for less than two samples is missed.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from manylora.energy_sources import (
    NO_GPU,
    Covers,
    Source,
    gpus_of,
    kwh_so_far,
    nvml_indices,
    sees_gpu,
    sources,
)

if TYPE_CHECKING:
    from codecarbon import OfflineEmissionsTracker

PARTS = ("cpu", "gpu", "ram")
JOULES_PER_KWH = 3.6e6
# CodeCarbon's own is 15, for services. It leaves out a last piece of less than 0.05 seconds.
SECONDS_BETWEEN_SAMPLES = 1.0


@dataclass(frozen=True)
class Energy:
    """What a piece of work took; each dict has cpu, gpu and ram.

    seconds: by the clock, longer too when other work runs beside it. measured: False where it is
    estimated. how: by what, as "RAPL". covers: that process, or all that the machine did.
    parallel: runs side by side, this one included.
    """

    seconds: float
    kwh: dict[str, float]
    measured: dict[str, bool]
    how: dict[str, str]
    covers: dict[str, Covers]
    parallel: int = 1

    @property
    def total(self) -> float:
        """kWh of all parts."""
        return sum(self.kwh.values())

    @property
    def shared(self) -> tuple[str, ...]:
        """The parts that hold the energy of the runs beside this one too."""
        if self.parallel == 1:
            return ()
        return tuple(part for part in PARTS if self.kwh[part] and self.covers[part] == "machine")


def require_codecarbon() -> None:
    """Raises RuntimeError, saying how to install CodeCarbon, when it is not there."""
    if find_spec("codecarbon") is None:
        raise RuntimeError(
            "energy is measured by codecarbon, which is not installed; install it with "
            "`pip install 'manylora[energy]'`"
        )


def energy_meter(device: torch.device | str | None = None, *, parallel: int = 1) -> EnergyMeter:
    """An EnergyMeter; raises RuntimeError here, before the work, where CodeCarbon is missing."""
    require_codecarbon()
    return EnergyMeter(device, parallel=parallel)


class EnergyMeter:
    """Measures what the `with` block takes: `with EnergyMeter() as meter: ...; meter.energy`.

    Entering costs two seconds the first time in a process, which are not counted. It raises
    RuntimeError when CodeCarbon cannot start or does not see the GPU. If it fails to stop, leaving
    does not raise, since the work is done by then: `energy` does.

    Args:
        device: where the work runs; on the CPU no GPU is counted. None: all GPUs that torch sees.
        parallel: runs side by side on this machine, this one included.
    """

    def __init__(self, device: torch.device | str | None = None, *, parallel: int = 1) -> None:
        if parallel < 1:
            raise ValueError(f"parallel={parallel}: give how many runs are side by side, 1 or more")
        self.devices = gpus_of(device)
        self.parallel = parallel
        self._tracker: OfflineEmissionsTracker | None = None
        self._energy: Energy | None = None
        self._problem = "the with block has not run"

    @property
    def energy(self) -> Energy:
        """Known once the block has ended, by an exception too; else a RuntimeError."""
        if self._tracker is not None:
            raise RuntimeError("the energy is not known yet: read it after the with block")
        if self._energy is None:
            raise RuntimeError(f"no energy: {self._problem}")
        return self._energy

    @property
    def so_far(self) -> dict[str, float]:
        """kWh of each part, in the block up to the last sample; reading it takes no measurement."""
        if self._tracker is None:
            return self.energy.kwh
        found = kwh_so_far(self._tracker)
        return found if self.devices else found | {"gpu": 0.0}

    def __enter__(self) -> Self:
        if self._tracker is not None:
            raise RuntimeError("this EnergyMeter is running; make another one inside its block")
        self._energy, self._problem = None, "the with block was not entered"
        _LOG.meters.add(self)
        self._folder = tempfile.TemporaryDirectory(prefix="manylora-energy-")
        try:
            self._tracker = _start(self.devices, self._folder.name, self.parallel)
        except BaseException:
            self._close()
            raise
        self._started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._tracker is not None
        tracker, self._tracker = self._tracker, None
        seconds = time.perf_counter() - self._started
        try:
            tracker.stop()
            found = vars(tracker).get("final_emissions_data")
            if found is None:
                self._problem = f"CodeCarbon could not stop: {_LOG.reason()}"
            else:
                kwh = {part: float(getattr(found, f"{part}_energy")) for part in PARTS}
                self._energy = _energy(tracker, kwh, seconds, bool(self.devices), self.parallel)
        finally:
            self._close()

    def _close(self) -> None:
        self._folder.cleanup()
        _LOG.meters.discard(self)


class _Log(logging.Filter):
    """Keeps CodeCarbon's log off the screen while a meter runs; it logs its failures only there."""

    def __init__(self) -> None:
        super().__init__()
        self.meters: set[EnergyMeter] = set()
        self.problems: deque[str] = deque(maxlen=3)

    def filter(self, record: logging.LogRecord) -> bool:
        if self.meters and record.exc_info:
            self.problems.append(repr(record.exc_info[1]))
        return not self.meters

    def reason(self) -> str:
        """The last that went wrong in CodeCarbon."""
        return "; ".join(self.problems) or "CodeCarbon does not say why"


_LOG = _Log()


def _start(devices: Sequence[torch.device], folder: str, parallel: int) -> OfflineEmissionsTracker:
    logging.getLogger("codecarbon").addFilter(_LOG)  # before the import, which logs too
    _LOG.problems.clear()
    tracker = _tracker(nvml_indices(devices), folder, parallel)
    tracker.start()
    # It swallows its own errors; a start that went well ends with a first sample.
    if not vars(tracker).get("_power_measurement_count"):
        problem = f"CodeCarbon could not start: {_LOG.reason()}"
    elif devices and not sees_gpu(tracker):
        problem = (
            f"the work runs on {', '.join(map(str, devices))}, but CodeCarbon sees no such GPU; it "
            "needs nvidia-smi and NVML, or AMD SMI"
        )
    else:
        return tracker
    tracker.stop()
    raise RuntimeError(f"{problem}. Repair that, or leave the energy out")


def _tracker(gpus: list[int] | None, folder: str, parallel: int) -> OfflineEmissionsTracker:
    """CodeCarbon, with all that could write, send or scale set: it would else be filled in from the
    user's CODECARBON_* variables and ~/.codecarbon.config.

    force_cpu_power and force_ram_power are left to those: who knows these watts knows them better
    than a table does.
    """
    from codecarbon import OfflineEmissionsTracker

    return OfflineEmissionsTracker(
        measure_power_secs=SECONDS_BETWEEN_SAMPLES,
        tracking_mode="process",
        force_mode_cpu_load=parallel > 1,
        gpu_ids=gpus,
        rapl_include_dram=False,  # the RAM is counted by itself
        rapl_prefer_psys=False,
        pue=1.0,
        wue=0.0,
        force_carbon_intensity_g_co2e_kwh=0.0,  # else it works out emissions, by a web service too
        electricitymaps_api_token="",
        country_iso_code=None,
        region=None,
        cloud_provider=None,
        cloud_region=None,
        output_methods=[],
        output_handlers=[],
        emissions_endpoint=None,
        output_dir=folder,  # Power Gadget and powermetrics leave their logs there
        allow_multiple_runs=True,  # else a lock file and signal handlers
        log_level=logging.getLogger("codecarbon").level,  # of the whole process: as it is
    )


def _energy(
    tracker: OfflineEmissionsTracker,
    kwh: dict[str, float],
    seconds: float,
    on_gpu: bool,
    parallel: int,
) -> Energy:
    found = sources(tracker, kwh["ram"] * JOULES_PER_KWH / seconds)
    if not on_gpu:  # one that is there is read all the same
        found["gpu"], kwh["gpu"] = NO_GPU, 0.0
    for part, source in found.items():
        if source.measured and source.covers == "machine" and not kwh[part]:
            how = f"{source.how} read 0: too short a time, or a counter that cannot be read"
            found[part] = Source(how, measured=False, covers=source.covers)
    return Energy(
        seconds=seconds,
        kwh=kwh,
        measured={part: found[part].measured for part in PARTS},
        how={part: found[part].how for part in PARTS},
        covers={part: found[part].covers for part in PARTS},
        parallel=parallel,
    )
