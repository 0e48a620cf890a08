"""Recorders: who wants to know which chunks changed since they last looked.

A recorder sees each chunk as *clean*, *dirty* or, when it has a bit for that, *in cut*::

            write                    write
    clean ───────► dirty    in-cut ───────► in-cut and dirty
    dirty ──take──► in-cut          (absent chunks are not taken)
    in-cut ──settle──► clean        the commit is known
    in-cut ──restore──► dirty       the cut was abandoned, or the process died

A chunk with content may also be taken *ahead* of a cut (`take_ahead`), and be uploaded while guests write on. It is
in-cut then, and not frozen. If it is still only in-cut when the cut is taken, what was uploaded is its content at that
instant, and the commit settles it with the rest; if it was written since, it is dirty, too, and the cut takes it.

Only a commit that is *known* settles. The migration recorder has no in-cut bit: the pre-copy planner owns
what it took, and puts back what was not acknowledged. Marking is the volume's business, because it must happen
before the device write and in the same step.

A chunk that is taken with content is *frozen* at the same time: until the cut has captured its old content, that
must be copied before it is overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable

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
    is_even,
    runs_where,
)
from silo.errors import InvariantError

Array = npt.NDArray[np.uint8]

__all__ = ["give_back", "restore", "settle", "take_ahead", "take_migration", "take_sync", "thaw"]

IS_ZERO = SYNC_IN_CUT | RESIDENCY_MASK & ~1, SYNC_IN_CUT | int(Residency.ZERO)
"""Mask and value of what is in a cut and zero, punched or not: content that was taken ahead is in no cut's runs."""


def _taken(state: int) -> int:
    """What a take makes of a state: one store, so a process that is killed in between leaves the old or the new."""
    if not state & SYNC_DIRTY:
        return state
    residency = state & RESIDENCY_MASK
    if residency >= Residency.ZERO:
        frozen = FROZEN if residency == Residency.PRESENT else 0
        return state & ~SYNC_DIRTY | SYNC_IN_CUT | frozen
    if state & (RESIDENCY_MASK | LOCKED) == Residency.ABSENT_STORE:
        # A write to a chunk in the store failed, and nothing of it is left: the newest content is still there.
        return state & ~SYNC_DIRTY
    return state


def _restored(state: int) -> int:
    """What the end of an abandoned cut makes of a state."""
    return (state | (SYNC_DIRTY if state & SYNC_IN_CUT else 0)) & ~(SYNC_IN_CUT | FROZEN)


_TAKEN = bytes(map(_taken, range(256)))
_RESTORED = bytes(map(_restored, range(256)))


def take_sync(chunks: ChunkMap) -> tuple[Indices, list[tuple[int, int]]]:
    """Move the dirty chunks that are known locally to in-cut.

    Returns the indices of those with content, which now are frozen, and the ``(first, limit)`` runs of those
    that are zero. Chunks at the peer, and those under an unacknowledged first write, stay dirty for a later cut.
    """
    if any(bool((states & FROZEN).any()) for _, states in chunks.dirty_windows(SYNC_IN_CUT)):
        raise InvariantError("a cut was taken while another one is not decided")
    zero: list[tuple[int, int]] = []
    data: list[tuple[int, Array]] = []
    count = 0
    for first, states in chunks.dirty_windows(SYNC_DIRTY):
        limit = first + len(states)
        chunks.translate(first, limit, _TAKEN)
        chunks.note_run(first, limit, SYNC_IN_CUT)
        if is_even(states) and states[0] & IS_ZERO[0] == IS_ZERO[1]:
            _extend(zero, [(first, limit)])
            continue
        if found := int(np.count_nonzero(states & FROZEN)):
            data.append((first, states))
            count += found
        if found < len(states):
            _extend(zero, runs_where(states & IS_ZERO[0] == IS_ZERO[1], first))
    return _frozen(data, count), zero


def _frozen(windows: list[tuple[int, Array]], count: int) -> Indices:
    """The indices of all ``count`` frozen chunks, in no more memory than that, because that can be every chunk."""
    indices = np.empty(count, dtype=np.int64)
    end = 0
    for first, states in windows:
        found = np.flatnonzero(states & FROZEN)
        start, end = end, end + len(found)
        np.add(found, first, out=indices[start:end])
    return indices


def _extend(runs: list[tuple[int, int]], more: list[tuple[int, int]]) -> None:
    """Append runs, the first of which may go on where the last one ended."""
    if runs and more and runs[-1][1] == more[0][0]:
        more[0] = (runs.pop()[0], more[0][1])
    runs += more


def thaw(chunks: ChunkMap) -> None:
    """Old content is not needed any more, however the cut ends."""
    for _, states in chunks.dirty_windows(SYNC_IN_CUT):
        states &= np.uint8(0xFF & ~FROZEN)


def take_ahead(chunks: ChunkMap, chunk: int) -> bool:
    """Move one dirty chunk with content to in-cut, without a cut. False when it is not one, or is locked.

    The caller reads its content afterwards, and nobody may be writing to it at this moment.
    """
    state = chunks.states[chunk]
    if state & (RESIDENCY_MASK | LOCKED | SYNC_DIRTY) != int(Residency.PRESENT) | SYNC_DIRTY:
        return False
    chunks.note(chunk, SYNC_IN_CUT)
    chunks.states[chunk] = state & ~SYNC_DIRTY | SYNC_IN_CUT
    return True


def give_back(chunks: ChunkMap, indices: Indices, runs: Iterable[tuple[int, int]] = ()) -> None:
    """What was taken and will not be committed is dirty again; what is not in-cut stays as it is."""
    taken = indices[chunks.view[indices] & SYNC_IN_CUT != 0]
    chunks.mark_many(taken, SYNC_DIRTY)
    chunks.clear_many(taken, SYNC_IN_CUT | FROZEN)
    for first, limit in runs:
        chunks.note_run(first, limit, SYNC_DIRTY)
        chunks.translate(first, limit, _RESTORED)


def settle(chunks: ChunkMap) -> None:
    """The commit is known: what was in the cut is clean, unless it was written again."""
    for _, states in chunks.dirty_windows(SYNC_IN_CUT):
        states &= np.uint8(0xFF & ~(SYNC_IN_CUT | FROZEN))


def restore(chunks: ChunkMap) -> None:
    """Nothing that was taken, ahead or for a cut, will be committed: it is dirty."""
    for first, states in chunks.dirty_windows(SYNC_IN_CUT):
        limit = first + len(states)
        chunks.translate(first, limit, _RESTORED)
        chunks.note_run(first, limit, SYNC_DIRTY)


def take_migration(chunks: ChunkMap) -> Indices:
    """The chunks written since the last call, which now are clean for the migration recorder."""
    taken = chunks.select_dirty(MIGRATION_DIRTY)
    for _, states in chunks.dirty_windows(MIGRATION_DIRTY):
        states &= np.uint8(0xFF & ~MIGRATION_DIRTY)
    return taken
