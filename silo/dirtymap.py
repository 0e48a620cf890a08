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

from collections.abc import Iterator

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
    join_indices,
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
    present: list[Indices] = []
    zero: list[tuple[int, int]] = []
    for first, states in chunks.dirty_windows(SYNC_DIRTY):
        with_content, zeroed = _take_window(states)
        chunks.note(first, SYNC_IN_CUT)
        if len(with_content):
            present.append(with_content + first)
        for low, high in runs_of(zeroed + first):
            if zero and zero[-1][1] == low:
                low = zero.pop()[0]
            zero.append((low, high))
    return join_indices(present), zero


def _take_window(states: npt.NDArray[np.uint8]) -> tuple[Indices, Indices]:
    dirty = np.flatnonzero(states & SYNC_DIRTY)
    residency = states[dirty] & RESIDENCY_MASK
    present = dirty[residency == Residency.PRESENT]
    zero = dirty[(residency == Residency.ZERO) | (residency == Residency.ZERO_UNPUNCHED)]
    # A write to a chunk in the store failed, and nothing of it is left: the newest content is still there.
    failed = dirty[states[dirty] & (RESIDENCY_MASK | LOCKED) == Residency.ABSENT_STORE]
    for taken, bits in ((present, SYNC_IN_CUT | FROZEN), (zero, SYNC_IN_CUT), (failed, 0)):
        states[taken] = states[taken] & (0xFF & ~SYNC_DIRTY) | bits
    return present, zero


def settle(chunks: ChunkMap) -> None:
    """The commit is known: what was in the cut is clean, unless it was written again."""
    for _, states in chunks.dirty_windows(SYNC_IN_CUT):
        states &= np.uint8(0xFF & ~(SYNC_IN_CUT | FROZEN))


def restore(chunks: ChunkMap) -> None:
    """The cut is abandoned: what was in it is dirty."""
    for first, states in chunks.dirty_windows(SYNC_IN_CUT):
        taken = (states & SYNC_IN_CUT) >> 1
        states &= np.uint8(0xFF & ~(SYNC_IN_CUT | FROZEN))
        states |= taken
        chunks.note(first, SYNC_DIRTY)


def take_migration(chunks: ChunkMap) -> Indices:
    """The chunks written since the last call, which now are clean for the migration recorder."""

    def taken() -> Iterator[Indices]:
        for first, states in chunks.dirty_windows(MIGRATION_DIRTY):
            yield np.flatnonzero(states & MIGRATION_DIRTY) + first
            states &= np.uint8(0xFF & ~MIGRATION_DIRTY)

    return join_indices(taken())
