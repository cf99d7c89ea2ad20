"""How much memory a run holds: of its processes, and of its devices where these tell."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

MEMORY_KEYS = ("memory/process_bytes", "memory/device_bytes", "memory/device_peak_bytes")
"""Keys in the metrics, each the most of any process or device."""
_STATM = Path("/proc/self/statm")
_STATS = ("bytes_in_use", "peak_bytes_in_use")


class MemoryUse:
    """Memory of all processes, from what each has measured once per step.

    Nothing here waits for a device: its allocator counts on the host.
    """

    def __init__(self, devices: Sequence[Any] = ()):
        """`devices` are those of this process; CPUs tell nothing."""
        self._devices = devices
        self._most = np.full(len(MEMORY_KEYS), np.nan)

    def mine(self) -> tuple[float, float, float]:
        """`MEMORY_KEYS` of this process now, NaN where unknown: bytes of its resident memory, and
        of its fullest device those in use and the most that ever were."""
        told = [_stats(device) for device in self._devices]
        held, peak = (max((each[k] for each in told if k in each), default=np.nan) for k in _STATS)
        return resident_bytes(), held, peak

    def add(self, measured: np.ndarray) -> None:
        """Adds `mine()` of all processes [processes, 3] for one step."""
        self._most = np.fmax.reduce([self._most, *measured])

    def summary(self) -> dict[str, int]:
        """The most of any process and step since the last summary; nothing of what is unknown."""
        most, self._most = self._most, np.full(len(MEMORY_KEYS), np.nan)
        each = zip(MEMORY_KEYS, most.tolist(), strict=True)
        return {key: int(held) for key, held in each if np.isfinite(held)}


def _stats(device: Any) -> dict[str, int]:
    with suppress(RuntimeError):  # a platform that has no such numbers
        return device.memory_stats() or {}
    return {}


def resident_bytes() -> float:
    """Memory of this process that is in RAM, pages shared with others included; NaN where the
    system has no `/proc`."""
    with suppress(OSError, ValueError, IndexError):
        return int(_STATM.read_text().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))
    return np.nan
