"""The rows of the table: which patterns of requests are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch

from benchmarks.nbd.fio import Cell
from silo.errors import InvalidRequestError

__all__ = ["QUICK", "ROWS", "TLS", "select"]

KIB, MIB = 1 << 10, 1 << 20

ROWS = (
    Cell("4k-randread-d1", "randread", 4 * KIB),
    Cell("4k-randread-d32", "randread", 4 * KIB, depth=32),
    Cell("4k-randread-4x32", "randread", 4 * KIB, depth=32, jobs=4),
    Cell("4k-randwrite-d1", "randwrite", 4 * KIB),
    Cell("4k-randwrite-d32", "randwrite", 4 * KIB, depth=32),
    Cell("4k-randwrite-4x32", "randwrite", 4 * KIB, depth=32, jobs=4),
    Cell("64k-randread-d16", "randread", 64 * KIB, depth=16),
    Cell("64k-randwrite-d16", "randwrite", 64 * KIB, depth=16),
    Cell("256k-randread-d8", "randread", 256 * KIB, depth=8),
    Cell("256k-randwrite-d8", "randwrite", 256 * KIB, depth=8),
    Cell("1m-read-d4", "read", MIB, depth=4),
    Cell("1m-write-d4", "write", MIB, depth=4),
    Cell("4k-randwrite-fsync", "randwrite", 4 * KIB, sync_every_write=True),
)
"""Name, fio's pattern, bytes per request, requests in flight per job, jobs (connections)."""

QUICK = ("4k-randread-d1", "4k-randread-d32", "4k-randwrite-d32", "256k-randread-d8", "1m-write-d4")


TLS = tuple(
    row
    for row in ROWS
    if row.name
    in {
        "4k-randread-d1",
        "4k-randread-d32",
        "4k-randwrite-d32",
        "256k-randread-d8",
        "256k-randwrite-d8",
        "1m-read-d4",
        "1m-write-d4",
    }
)
"""What is measured over TLS."""


def select(patterns: Iterable[str], among: Sequence[Cell] = ROWS) -> list[Cell]:
    """The rows whose names match any of the shell patterns, in the order of the table.

    Patterns that match nothing at all are refused; there may be none ``among`` those that are asked about.
    """
    wanted = list(patterns)
    rows = [row for row in among if any(fnmatch(row.name, pattern) for pattern in wanted)]
    if not any(fnmatch(row.name, pattern) for row in ROWS for pattern in wanted):
        names = ", ".join(row.name for row in ROWS)
        raise InvalidRequestError(f"no row matches {' '.join(wanted)}", hint=f"there are {names}")
    return rows
