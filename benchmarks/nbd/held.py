"""What a busy server holds in memory: sixteen clients that ask for far more than it may hold at once.

The disk is a file, so that what is counted (anonymous memory, `resident_bytes`) is the server's own: buffers, requests
in flight, replies that nobody has taken yet, and the maps, which were there before the load.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Self

from benchmarks.common.child import ListeningChild, resident_bytes
from benchmarks.common.table import Table
from benchmarks.nbd.fio import Cell, Client, run_cell

__all__ = ["CONNECTIONS", "DEPTH", "held_table", "peak_bytes"]

CONNECTIONS, DEPTH, REQUEST = 16, 128, 256 << 10
_INTERVAL_S = 0.01
MIB = 1 << 20


class _Watch:
    """Looks at a process's memory again and again, and remembers the most that it has seen."""

    def __init__(self, pid: int) -> None:
        self.peak = resident_bytes(pid)
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            self.peak = max(self.peak, resident_bytes(self._pid))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def peak_bytes(server: ListeningChild, client: Client, size: int, rw: str, runtime_s: float) -> int:
    """The most that the server holds while it serves all of these clients."""
    cell = Cell("held", rw, REQUEST, depth=DEPTH, jobs=CONNECTIONS)
    with _Watch(server.pid) as watch:
        run_cell(cell, client, server.pid, size, runtime_s, seed=1)
    return watch.peak


def held_table(servers: Sequence[tuple[str, ListeningChild, Client]], size: int, runtime_s: float) -> Table:
    """``(name, server, client)`` of each: idle, and at most while all clients read, and write."""
    rows = []
    for name, server, client in servers:
        idle = resident_bytes(server.pid)
        peaks = [peak_bytes(server, client, size, rw, runtime_s) for rw in ("randread", "randwrite")]
        above = max(peaks) - idle
        rows.append((name, *(f"{value / MIB:.1f}" for value in (idle, *peaks, above))))
    title = f"Memory of the server in MiB, {CONNECTIONS} connections × depth {DEPTH} × {REQUEST >> 10} KiB"
    return Table(title, ("server", "idle", "most while reading", "while writing", "above idle"), rows)
