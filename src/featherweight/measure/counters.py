"""Energy counters of processors and graphics cards, read where the system lets us."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Counter(Protocol):
    """Microjoules that run up to `limit` and then start anew."""

    @property
    def name(self) -> str: ...

    @property
    def limit(self) -> int: ...

    def read(self) -> int: ...


@dataclass(frozen=True)
class RaplCounter:
    """A counter of the Linux power capping interface (RAPL; AMD's are found there too)."""

    name: str
    path: Path
    limit: int

    def read(self) -> int:
        return int(self.path.read_text())


@dataclass(frozen=True)
class NvmlCounter:
    """The counter of one NVIDIA card, from the driver's own library."""

    name: str
    library: Any
    handle: Any
    limit: int = 2**64 - 1

    def read(self) -> int:
        """Raises `OSError` if the driver does not answer any more."""
        millijoules = ctypes.c_ulonglong()
        code = self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(millijoules))
        if code != 0:
            raise OSError(f"{self.name}: the NVIDIA driver gives no energy (error {code})")
        return millijoules.value * 1000


def rapl_counters(folder: Path) -> list[Counter]:
    """The readable counters of processor packages and of memory below `folder`; none where the system has none.

    Counters of parts of a package, and the one of the whole platform, would count the same joules twice: left out.
    """
    found: list[Counter] = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        path = zone / "energy_uj"
        if os.access(path, os.R_OK) and os.access(zone / "name", os.R_OK):
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                limit = int((zone / "max_energy_range_uj").read_text())
                found.append(RaplCounter(f"RAPL {name}", path, limit))
    return found


def nvml_counters(library: Any = None) -> list[Counter]:
    """The counter of the card that this process sees first; none without a driver or on a card older than Volta."""
    try:
        library = library or ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:  # no driver
        return []
    handle = ctypes.c_void_p()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    if library.nvmlInit_v2() != 0:
        return []
    if first.isdigit():
        code = library.nvmlDeviceGetHandleByIndex_v2(int(first), ctypes.byref(handle))
    else:
        code = library.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(handle))
    counter = NvmlCounter(f"NVML {first}", library, handle)
    unused = ctypes.c_ulonglong()
    if code != 0 or library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(unused)) != 0:
        return []
    return [counter]


def spent(before: int, after: int, limit: int) -> int:
    """Microjoules between two readings of a counter that starts anew after `limit`."""
    return after - before if after >= before else after - before + limit + 1
