"""What tracking costs: CPU time per request with the maps, minus without them, and whether history matters.

Measured inside one process and without a socket, because the difference is far below what a benchmark over a
socket can see: the same requests on the same device in memory, once through the volume and once straight at the
device. History is what the maps have seen before: none, a million requests, ten million.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from benchmarks.common.table import Table
from benchmarks.common.turns import Summary, summarise, take_turns
from silo.abc import Buffer
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.group import Group
from silo.volume import Volume

__all__ = ["tracking_table"]

SIZE = 1 << 30
REQUEST_SIZE = 4096
REQUESTS = 50_000
HISTORIES = (0, 1_000_000, 10_000_000)
NANOSECONDS = 1e-9


def tracking_table(rounds: int) -> Table:
    """CPU µs per request: through the volume, at the bare device, and the difference."""
    volume = Group("bench", SystemClock()).add("disk", MemoryDevice(SIZE))
    chance = random.Random(1)
    offsets = [REQUEST_SIZE * chance.randrange(SIZE // REQUEST_SIZE) for _ in range(REQUESTS)]
    _bare_write(volume, offsets)  # the device's memory is there from now on
    rows: list[tuple[str, ...]] = []
    seen = 0
    for history in HISTORIES:
        while seen < history:
            _tracked_write(volume, offsets)
            seen += REQUESTS
        for kind, tracked, bare in (
            ("read", _tracked_read, _bare_read),
            ("write", _tracked_write, _bare_write),
        ):
            on, off, cost = _compare(volume, offsets, tracked, bare, rounds)
            rows.append(
                (
                    f"4 KiB {kind} after {history / 1e6:g} million requests",
                    f"{on.median:.2f}",
                    f"{off.median:.2f}",
                    f"{cost.median:.2f} [{cost.low:.2f}-{cost.high:.2f}]",
                )
            )
    return Table(
        "Cost of tracking, CPU µs per request", ("request", "with maps", "without", "difference"), rows
    )


Run = Callable[[Volume, Sequence[int]], None]


def _compare(
    volume: Volume, offsets: Sequence[int], tracked: Run, bare: Run, rounds: int
) -> tuple[Summary, Summary, Summary]:
    runs = {"tracked": tracked, "bare": bare}

    def measure(name: str, _round: int) -> dict[str, float]:
        before = time.process_time_ns()
        runs[name](volume, offsets)
        return {"us": (time.process_time_ns() - before) * NANOSECONDS * 1e6 / len(offsets)}

    samples = take_turns(list(runs), rounds, measure)
    on = [sample["us"] for sample in samples["tracked"]]
    off = [sample["us"] for sample in samples["bare"]]
    return summarise(on), summarise(off), summarise([a - b for a, b in zip(on, off, strict=True)])


def _tracked_read(volume: Volume, offsets: Sequence[int]) -> None:
    read = volume.read_nowait
    for offset in offsets:
        read(offset, REQUEST_SIZE)


def _bare_read(volume: Volume, offsets: Sequence[int]) -> None:
    read = volume.device.read_nowait
    for offset in offsets:
        read(offset, REQUEST_SIZE)


def _tracked_write(volume: Volume, offsets: Sequence[int]) -> None:
    write, data = volume.write_nowait, _DATA
    for offset in offsets:
        write(offset, data)


def _bare_write(volume: Volume, offsets: Sequence[int]) -> None:
    write, data = volume.device.write_nowait, _DATA
    for offset in offsets:
        write(offset, data)


_DATA: Buffer = b"x" * REQUEST_SIZE
