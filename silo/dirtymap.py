"""Recorders: who wants to know which chunks changed since they last looked.

A recorder sees each chunk as *clean*, *dirty* or, when it has a bit for that, *in cut*::

            write                    write
    clean ───────► dirty    in-cut ───────► in-cut and dirty
    dirty ──take──► in-cut          (absent chunks are not taken and stay dirty)
    in-cut ──settle──► clean        the commit is known
    in-cut ──restore──► dirty       the cut was abandoned, or the process died

Only a commit that is *known* settles. The migration recorder has no in-cut bit: the pre-copy planner owns
what it took, and puts back what was not acknowledged. Marking is the volume's business, because it must happen
before the device write and in the same step.
"""

from __future__ import annotations

import numpy as np

from silo.chunkmap import (
    FROZEN,
    MIGRATION_DIRTY,
    RESIDENCY_MASK,
    SYNC_DIRTY,
    SYNC_IN_CUT,
    ChunkMap,
    Indices,
    Residency,
)
from silo.errors import InvariantError

__all__ = ["freeze", "restore", "settle", "take_migration", "take_sync"]


def take_sync(chunks: ChunkMap) -> tuple[Indices, Indices]:
    """Move the locally known dirty chunks to in-cut. Returns ``(present, zero)``, ascending.

    A dirty chunk that is absent has an unacknowledged first write under way; it is left dirty for the next cut.
    """
    if chunks.count_dirty(SYNC_IN_CUT):
        raise InvariantError("a cut was taken while another one is not decided")
    dirty = chunks.select_dirty(SYNC_DIRTY)
    residency = chunks.view[dirty] & RESIDENCY_MASK
    known = dirty[residency >= Residency.ZERO]
    chunks.clear_many(known, SYNC_DIRTY)
    chunks.mark_many(known, SYNC_IN_CUT)
    return dirty[residency == Residency.PRESENT], dirty[
        (residency == Residency.ZERO) | (residency == Residency.ZERO_UNPUNCHED)
    ]


def freeze(chunks: ChunkMap, present: Indices) -> None:
    """From now on the old content of these chunks must be copied before it is overwritten."""
    chunks.view[present] |= np.uint8(FROZEN)


def settle(chunks: ChunkMap) -> None:
    """The commit is known: what was in the cut is clean, unless it was written again."""
    taken = chunks.select_dirty(SYNC_IN_CUT)
    chunks.clear_many(taken, SYNC_IN_CUT | FROZEN)


def restore(chunks: ChunkMap) -> None:
    """The cut is abandoned: what was in it is dirty."""
    taken = chunks.select_dirty(SYNC_IN_CUT)
    chunks.clear_many(taken, SYNC_IN_CUT | FROZEN)
    chunks.mark_many(taken, SYNC_DIRTY)


def take_migration(chunks: ChunkMap) -> Indices:
    """The chunks written since the last call, which now are clean for the migration recorder."""
    dirty = chunks.select_dirty(MIGRATION_DIRTY)
    chunks.clear_many(dirty, MIGRATION_DIRTY)
    return dirty
