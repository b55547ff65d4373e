"""A meter of energy: what it gives, when, and that it leaves nothing behind."""

from __future__ import annotations

import importlib.util
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from energy_hardware import WATT_SECOND, half_used_cpu, install, ram
from manylora import energy
from manylora.energy import EnergyMeter, energy_meter


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, no file in the working directory, no configuration of the user."""

    asked: list[Any] = []

    def refuse(*where: Any, **_: Any) -> None:
        asked.append(where)  # CodeCarbon swallows errors
        raise OSError("no network here")

    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked
    assert not list(working.iterdir())


def test_a_short_run_on_this_machine_takes_time_and_energy() -> None:
    with energy_meter("cpu") as meter:
        until = time.perf_counter() + 1.2
        while time.perf_counter() < until:
            sum(range(1000))
    found = meter.energy
    assert 1.2 <= found.seconds < 10
    assert found.kwh["cpu"] > 0 and found.kwh["ram"] > 0 and found.kwh["gpu"] == 0
    assert found.total == pytest.approx(sum(found.kwh.values()))
    assert set(found.kwh) == set(found.measured) == set(found.how) == set(found.covers)
    assert all(found.how.values())
    assert found.measured["gpu"] and found.how["gpu"] == "no GPU was used"
    assert found.shared == ()


def test_an_idle_process_takes_less_of_the_cpu_than_a_busy_one() -> None:
    with energy_meter("cpu", parallel=2) as idle:
        time.sleep(0.6)
    with energy_meter("cpu", parallel=2) as busy:
        until = time.perf_counter() + 0.6
        while time.perf_counter() < until:
            sum(range(1000))
    assert busy.energy.covers["cpu"] == "process"
    assert idle.energy.kwh["cpu"] < busy.energy.kwh["cpu"] / 2


def test_an_exception_inside_stops_the_meter_and_passes_through(tmp_path: Path) -> None:
    def fail() -> None:
        time.sleep(0.1)
        raise KeyError("inside")

    before = set(threading.enumerate())
    meter = EnergyMeter("cpu")
    with pytest.raises(KeyError, match="inside"), meter:
        fail()
    assert meter.energy.seconds >= 0.1
    time.sleep(0.1)
    assert not {t for t in threading.enumerate() if t.is_alive()} - before
    assert not Path(meter._folder.name).exists()


def test_a_meter_inside_another_is_part_of_it() -> None:
    with EnergyMeter("cpu") as outer:
        time.sleep(0.2)
        with EnergyMeter("cpu") as inner:
            time.sleep(0.2)
        assert logging.getLogger("codecarbon").filter(_record()) is False
        time.sleep(0.2)
    assert 0.2 <= inner.energy.seconds <= outer.energy.seconds - 0.4
    assert 0 < inner.energy.kwh["ram"] < outer.energy.kwh["ram"]


def test_a_meter_is_read_after_its_block_and_used_again() -> None:
    meter = EnergyMeter("cpu")
    with pytest.raises(RuntimeError, match="has not run"):
        _ = meter.energy
    with meter:
        with pytest.raises(RuntimeError, match="after the with block"):
            _ = meter.energy
        with pytest.raises(RuntimeError, match="make another one"), meter:
            pass
        time.sleep(0.2)
    first = meter.energy
    with meter:
        pass
    assert meter.energy.seconds < first.seconds


def test_nothing_is_printed_and_the_log_is_back_afterwards(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codecarbon.core.hardware_cache._plans", {})
    log = logging.getLogger("codecarbon")
    level = log.level
    with EnergyMeter("cpu"):
        log.warning("unheard")
    assert capfd.readouterr() == ("", "")
    assert log.level == level
    assert log.filter(_record())


def test_the_users_configuration_turns_on_no_network_and_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {
        "OUTPUT_METHODS": "csv,api",
        "SAVE_TO_FILE": "true",
        "EMISSIONS_ENDPOINT": "http://localhost:1",
        "ELECTRICITYMAPS_API_TOKEN": "token",
        "CO2_SIGNAL_API_TOKEN": "token",
        "ALLOW_MULTIPLE_RUNS": "false",
        "TRACKING_MODE": "machine",
        "COUNTRY_ISO_CODE": "FRA",
        "PUE": "1000",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"CODECARBON_{name}", value)
    with EnergyMeter("cpu", parallel=2) as meter:
        time.sleep(0.2)
    assert meter.energy.covers["cpu"] == "process"
    assert meter.energy.kwh["ram"] < 100 * meter.energy.seconds * WATT_SECOND


def test_a_failed_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = half_used_cpu(monkeypatch)
    monkeypatch.setattr(cpu, "start", lambda: 1 / 0)
    install(monkeypatch, ram(), cpu)
    with (
        pytest.raises(RuntimeError, match=r"could not start.*division by zero"),
        EnergyMeter("cpu"),
    ):
        pytest.fail("the work began")
    assert not energy._LOG.meters


def test_a_failed_end_keeps_the_work_and_says_why_when_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = half_used_cpu(monkeypatch)
    install(monkeypatch, ram(), cpu)
    with EnergyMeter("cpu") as meter:
        time.sleep(0.1)
        monkeypatch.setattr(cpu, "measure_power_and_energy", lambda last_duration: 1 / 0)
    with pytest.raises(RuntimeError, match=r"could not stop.*division by zero"):
        _ = meter.energy


def test_without_codecarbon_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        energy, "find_spec", lambda name: None if name == "codecarbon" else there(name)
    )
    with pytest.raises(RuntimeError, match=r"pip install 'manylora\[energy\]'"):
        energy_meter("cpu")


def _record() -> logging.LogRecord:
    return logging.LogRecord("codecarbon", logging.INFO, "", 0, "a line", None, None)
