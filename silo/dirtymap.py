"""Recorders: who wants to know which chunks changed since they last looked.

A recorder sees each chunk as *clean*, *dirty* or, when it has a bit for that, *in cut*::

            write                    write
    clean ───────► dirty    in-cut ───────► in-cut and dirty
    dirty ──take──► in-cut          (absent chunks are not taken)
    in-cut ──settle──► clean        the commit is known
    in-cut ──restore──► dirty       the cut was abandoned, or the process died

Only a commit that is *known* settles. The migration recorder has no in-cut bit: the pre-copy planner owns
what it took, and puts back what was not acknowledged. Marking is the volume's business, because it must happen
before the device write and in the same step.

A chunk that is taken with content is *frozen* at the same time: until the cut has captured its old content, that
must be copied before it is overwritten.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from silo.chunkmap import (
    FROZEN,
    LOCKED,
    MIGRATION_DIRTY,
    RESIDENCY_MASK,
    SYNC_DIRTY,
    SYNC_IN_CUT,
    ChunkMap,
    Indices,
    Residency,
    runs_of,
)
from silo.errors import InvariantError

__all__ = ["restore", "settle", "take_migration", "take_sync"]


def take_sync(chunks: ChunkMap) -> tuple[Indices, list[tuple[int, int]]]:
    """Move the dirty chunks that are known locally to in-cut.

    Returns the indices of those with content, which now are frozen, and the ``(first, limit)`` runs of those
    that are zero. Chunks at the peer, and those under an unacknowledged first write, stay dirty for a later cut.
    """
    if chunks.count_dirty(SYNC_IN_CUT):
        raise InvariantError("a cut was taken while another one is not decided")
    zero: list[tuple[int, int]] = []
    for first, states in chunks.dirty_windows(SYNC_DIRTY):
        _take_window(states)
        chunks.note(first, SYNC_IN_CUT)
        for low, high in runs_of(np.flatnonzero(states & (SYNC_IN_CUT | FROZEN) == SYNC_IN_CUT) + first):
            start = zero.pop()[0] if zero and zero[-1][1] == low else low
            zero.append((start, high))
    return chunks.select_dirty(SYNC_IN_CUT, FROZEN, FROZEN), zero


def _take_window(states: npt.NDArray[np.uint8]) -> None:
    dirty = states & SYNC_DIRTY != 0
    residency = states & RESIDENCY_MASK
    present = dirty & (residency == Residency.PRESENT)
    known = dirty & (residency >= Residency.ZERO)
    # A write to a chunk in the store failed, and nothing of it is left: the newest content is still there.
    failed = dirty & (states & (RESIDENCY_MASK | LOCKED) == Residency.ABSENT_STORE)
    # In this order, because a process that is killed in between must leave one of the two bits.
    states[known] |= np.uint8(SYNC_IN_CUT)
    states[known | failed] &= np.uint8(0xFF & ~SYNC_DIRTY)
    states[present] |= np.uint8(FROZEN)


def settle(chunks: ChunkMap) -> None:
    """The commit is known: what was in the cut is clean, unless it was written again."""
    for _, states in chunks.dirty_windows(SYNC_IN_CUT):
        states &= np.uint8(0xFF & ~(SYNC_IN_CUT | FROZEN))


def restore(chunks: ChunkMap) -> None:
    """The cut is abandoned: what was in it is dirty."""
    for first, states in chunks.dirty_windows(SYNC_IN_CUT):
        taken = (states & SYNC_IN_CUT) >> 1
        states |= taken
        states &= np.uint8(0xFF & ~(SYNC_IN_CUT | FROZEN))
        chunks.note(first, SYNC_DIRTY)


def take_migration(chunks: ChunkMap) -> Indices:
    """The chunks written since the last call, which now are clean for the migration recorder."""
    taken = chunks.select_dirty(MIGRATION_DIRTY)
    for _, states in chunks.dirty_windows(MIGRATION_DIRTY):
        states &= np.uint8(0xFF & ~MIGRATION_DIRTY)
    return taken
