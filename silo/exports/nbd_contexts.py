"""Metadata contexts: what ``BLOCK_STATUS`` tells a client about a volume.

===============================  ===========================================================================
name                             flags of an extent
===============================  ===========================================================================
``base:allocation``              1 hole, 2 reads as zeros
``qemu:dirty-bitmap:sync``       1 changed since the newest commit that is known (a cut in progress included)
``qemu:dirty-bitmap:migration``  1 changed since the migration recorder last looked
``silo:residency``               0 zeros, 1 local, 2 only at the peer, 3 only in the store
``silo:heat``                    bits 0-7 how often read, bits 8-15 how often written, of late: ``n`` stands
                                 for at least ``2**(n-1)`` requests, 0 for fewer than one
===============================  ===========================================================================

All of them have the resolution of a chunk. An answer may end before the request does, which the protocol
allows: no request makes us look at more than `WINDOW_CHUNKS` chunks or send more than `EXTENTS_MAX` extents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from silo.chunkmap import MIGRATION_DIRTY, RESIDENCY_MASK, SYNC_DIRTY, SYNC_IN_CUT, Residency
from silo.exports.nbd_wire import AllocationStatus
from silo.volume import Volume

__all__ = ["CONTEXT_NAMES", "EXTENTS_MAX", "WINDOW_CHUNKS", "status_extents"]

WINDOW_CHUNKS: Final = 1 << 20
"""About two milliseconds of scanning; 64 GiB at the usual chunk size, and more than 32-bit lengths can ask for."""
EXTENTS_MAX: Final = 1 << 16
"""A megabyte of extended status, a sixteenth of what the protocol allows in one chunk."""

_Flags = npt.NDArray[np.uint32]
_HOLE_AND_ZERO: Final = int(AllocationStatus.HOLE | AllocationStatus.ZERO)


def _table(values: dict[Residency, int]) -> _Flags:
    """Flags by residency, as something that numpy can index with a whole map."""
    table = np.zeros(RESIDENCY_MASK + 1, dtype=np.uint32)
    for residency, flags in values.items():
        table[residency] = flags
    return table


_ALLOCATION: Final = _table({Residency.ZERO: _HOLE_AND_ZERO, Residency.ZERO_UNPUNCHED: _HOLE_AND_ZERO})
_RESIDENCY: Final = _table({Residency.PRESENT: 1, Residency.ABSENT_PEER: 2, Residency.ABSENT_STORE: 3})


def _residency(table: _Flags) -> Callable[[Volume, int, int], _Flags]:
    def flags(volume: Volume, first: int, limit: int) -> _Flags:
        looked_up: _Flags = table[volume.chunks.view[first:limit] & RESIDENCY_MASK]
        return looked_up

    return flags


def _dirty(bits: int) -> Callable[[Volume, int, int], _Flags]:
    def flags(volume: Volume, first: int, limit: int) -> _Flags:
        marked: _Flags = ((volume.chunks.view[first:limit] & bits) != 0).astype(np.uint32)
        return marked

    return flags


def _heat(volume: Volume, first: int, limit: int) -> _Flags:
    reads = np.frexp(volume.heat.read_heat(first, limit))[1].clip(0, 255)
    writes = np.frexp(volume.heat.write_heat(first, limit))[1].clip(0, 255)
    both: _Flags = (reads | writes << 8).astype(np.uint32)
    return both


_CONTEXTS: Final[dict[str, Callable[[Volume, int, int], _Flags]]] = {
    "base:allocation": _residency(_ALLOCATION),
    "qemu:dirty-bitmap:sync": _dirty(SYNC_DIRTY | SYNC_IN_CUT),
    "qemu:dirty-bitmap:migration": _dirty(MIGRATION_DIRTY),
    "silo:residency": _residency(_RESIDENCY),
    "silo:heat": _heat,
}
CONTEXT_NAMES: Final = tuple(_CONTEXTS)


def status_extents(
    volume: Volume, context: str, offset: int, length: int, *, single: bool
) -> list[tuple[int, int]]:
    """``(length, flags)`` of consecutive extents from ``offset`` on, neighbours with equal flags joined.

    They never reach beyond the request, whose ``length`` must be positive and inside the volume. ``single``
    stops after the first.
    """
    shift = volume.geometry.chunk_shift
    first, limit = volume.geometry.touched(offset, length)
    limit = min(limit, first + WINDOW_CHUNKS)
    end = min(offset + length, limit << shift)
    flags = _CONTEXTS[context](volume, first, limit)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(flags)) + 1))[: 2 if single else EXTENTS_MAX + 1]
    edges = [offset, *((int(start) + first) << shift for start in starts[1:]), end]
    found = [(edges[i + 1] - edges[i], int(flags[start])) for i, start in enumerate(starts)]
    return found[:1] if single else found[:EXTENTS_MAX]
