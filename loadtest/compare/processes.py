"""Cores and CPU seconds, of a process and of all that is not ours, where the system tells them: on Linux."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from pathlib import Path

# Fields of /proc/PID/stat, counted behind the name in brackets: user and system time, in clock ticks.
_USER, _SYSTEM = 11, 12


def cores_of(pid: int) -> list[int]:
    """Those that it may run on; empty where the system does not tell, or if it is gone."""
    try:
        return sorted(os.sched_getaffinity(pid))
    except (AttributeError, ProcessLookupError):
        return []


def cpu_seconds(pid: int) -> float | None:
    """All its threads' since it started; None where the system does not tell, or if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[_USER]) + int(fields[_SYSTEM])) / os.sysconf("SC_CLK_TCK")


def others_cpu_seconds(cores: Collection[int]) -> float | None:
    """What these cores have done since the machine's start, less what this process and its children have.

    What a hypervisor took away counts as others' too. A difference of two is meant: children that have ended are not
    ours any more. None where the system does not tell.
    """
    try:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
    except OSError:
        return None
    wanted, ticks = {f"cpu{core}" for core in cores}, 0
    for name, *fields in map(str.split, lines):
        if name in wanted:
            # All but idling (fourth) and waiting for disks (fifth); guests are users.
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    ours = sum(cpu_seconds(int(pid)) or 0.0 for pid in [str(os.getpid()), *children])
    return ticks / os.sysconf("SC_CLK_TCK") - ours


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
