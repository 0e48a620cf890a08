"""The real clock: the one module that may read time or draw random numbers."""

from __future__ import annotations

import os
import time

import attrs

from silo.abc import Clock

__all__ = ["SystemClock", "boot_id"]


@attrs.frozen
class SystemClock(Clock):
    """The operating system's clocks and its random source."""

    def monotonic(self) -> float:
        return time.monotonic()

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        return time.time()

    def token(self, size: int) -> bytes:
        return os.urandom(size)


def boot_id() -> str:
    """A name of this boot of the machine: page cache survives a process, but not a change of this name."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
