"""Where a benchmark ran: without this beside it, a number means nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import attrs

__all__ = ["BusyTime", "Machine", "busy_time", "describe_machine"]


@attrs.frozen
class Machine:
    """The facts about a machine that a reader needs in order to judge a number."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    tools: dict[str, str]
    load: tuple[float, float, float]
    """Load averages over 1, 5 and 15 minutes when the run began."""


def describe_machine(tools: Sequence[str]) -> Machine:
    """The machine that we run on, with the versions of ``tools`` (programs that answer ``--version``)."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        kernel=platform.release(),
        python=platform.python_version(),
        tools={tool: _version(tool) for tool in tools},
        load=os.getloadavg(),
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(tool: str) -> str:
    if shutil.which(tool) is None:
        return "not installed"
    answer = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    return answer.splitlines()[0].strip() if answer else "unknown"


@attrs.frozen
class BusyTime:
    """CPU time of the whole machine since boot, in seconds."""

    busy_s: float
    total_s: float


def busy_time() -> BusyTime:
    """How busy all cores have been. Two of these, less our own processes, tell what others took meanwhile."""
    first_line = Path("/proc/stat").read_text().splitlines()[0]
    ticks = [int(field) for field in first_line.split()[1:9]]  # guest time is contained in user time
    idle = ticks[3] + ticks[4]
    unit = os.sysconf("SC_CLK_TCK")
    return BusyTime(busy_s=(sum(ticks) - idle) / unit, total_s=sum(ticks) / unit)
