"""The migrations that are measured."""

from __future__ import annotations

from benchmarks.migration.scenario import Scenario

__all__ = ["bulk", "downtime", "evacuation", "moved"]

MIB, GIB = 1 << 20, 1 << 30


def bulk(size: int, *, tls: bool = False) -> Scenario:
    """Everything is unique: a full disk in memory, and no store."""
    return Scenario(name="bulk", size=size, unsynced=size, tls=tls)


def downtime() -> Scenario:
    """A disk that is stored but for a few chunks, on files, with a register on the local disk."""
    return Scenario(
        name="downtime", size=64 * MIB, synced=32 * MIB, medium="file", store=True, dirty_chunks=8
    )


def moved() -> Scenario:
    """Half of what is used is stored; a guest writes chunks again while the disk moves."""
    return Scenario(
        name="moved", size=512 * MIB, synced=64 * MIB, unsynced=64 * MIB, store=True, rewrites_per_s=200
    )


def evacuation(*, large: bool, quick: bool) -> Scenario:
    """The same 256 MiB that nobody else has, on a small and on a large sparse disk."""
    unsynced = (8 if quick else 256) * MIB
    size = (1 if quick else 16) * GIB if large else (256 * MIB if quick else GIB)
    return Scenario(name="large" if large else "small", size=size, unsynced=unsynced, store=True)
