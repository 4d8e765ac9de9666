"""Energy that this machine takes: measured where it has a meter, else estimated or unknown, and labelled so."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

WATTS_OF_A_BUSY_CORE = 8.0  # the estimate's one assumption, where there is no meter
_RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")

RAPL, NVML, ESTIMATED, UNKNOWN, NONE = "rapl", "nvml", "estimated", "unknown", "none"


@dataclass(frozen=True)
class Energy:
    """Energy, and where its figure is from.

    joules: None where they are unknown.
    source: one of the names above; NONE means that there is nothing to measure.
    """

    joules: float | None
    source: str


class EnergyMeter:
    """Measures from its making on.

    Meters count a whole chip, other programs included; an estimate counts this process.
    """

    def __init__(self) -> None:
        self._package = _package_joules()
        self._processor_seconds = time.process_time()
        self._accelerators = _accelerator_joules()

    def processor(self) -> Energy:
        """The processor's energy by RAPL, else estimated from this process's processor time."""
        now = _package_joules()
        if now is not None and self._package is not None and now >= self._package:
            return Energy(now - self._package, RAPL)
        return Energy((time.process_time() - self._processor_seconds) * WATTS_OF_A_BUSY_CORE, ESTIMATED)

    def accelerator(self) -> Energy:
        """The energy of the accelerators that torch sees, by NVML; unknown without NVML, for there is no estimate."""
        if not torch.cuda.is_available():
            return Energy(0.0, NONE)
        now = _accelerator_joules()
        if now is None or self._accelerators is None:
            return Energy(None, UNKNOWN)
        return Energy(now - self._accelerators, NVML)


def _package_joules() -> float | None:
    try:
        return int(_RAPL.read_text()) / 1e6
    except (OSError, ValueError):
        return None


def _accelerator_joules() -> float | None:
    """Joules of all accelerators that torch sees, since the driver was loaded; None where NVML does not tell."""
    library = _nvml()
    if library is None or not torch.cuda.is_available():
        return None
    total = 0.0
    for index in range(torch.cuda.device_count()):
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
        if library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return None  # a card older than Volta
        total += millijoules.value / 1000
    return total


@lru_cache(maxsize=1)
def _nvml() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library
