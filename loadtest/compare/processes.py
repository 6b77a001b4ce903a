"""Cores and CPU seconds of a process, where the system tells them: on Linux."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# Of /proc/PID/stat, counted behind the name in brackets: user and system time, in clock ticks.
_USER, _SYSTEM = 11, 12


def cores_of(pid: int) -> list[int]:
    """Those that it may run on; empty where the system does not tell, or if it is gone."""
    try:
        return sorted(os.sched_getaffinity(pid))
    except (AttributeError, ProcessLookupError):
        return []


def cpu_seconds(pid: int) -> float | None:
    """Of all its threads since it started; None where the system does not tell, or if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[_USER]) + int(fields[_SYSTEM])) / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    """The model of the machine's processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
