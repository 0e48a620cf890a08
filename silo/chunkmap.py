"""What is known of every chunk of a volume, in one byte per chunk.

========  ====================  =================================================================
bits      name                  meaning
========  ====================  =================================================================
0-2       residency             where the newest content is, see `Residency`
3         ``LOCKED``            in transition: an asynchronous device phase owns the chunk
4         ``FROZEN``            the cut in progress still needs the old content on the device
5         ``SYNC_DIRTY``        changed since the sync recorder's last take
6         ``SYNC_IN_CUT``       taken for a cut whose commit is not known
7         ``MIGRATION_DIRTY``   changed since the migration recorder's last take
========  ====================  =================================================================

One byte, because the guest's path must decide with one load and mark with one store. The bytes may live in
a shared mapping, so that they survive the death of the process; ``LOCKED`` and ``FROZEN`` speak of the
process itself and mean nothing to the next one (see `after_restart`). Therefore a state changes in one store from
one truth to the next, or in several of which each leaves one: a process can be killed between any two.

Beside the states there is a summary: for every window of 4096 chunks, which dirty bits occur in it, so that
taking the dirty chunks of a large volume costs what was written, not what exists. A summary bit may be set
without need, never missing.

Some steps touch the whole map and cannot be divided: a cut right after a guest has trimmed its disk. They stay
short because they are one pass over the bytes, and because whole runs of a real disk are in one state
(`ChunkMap.translate`).

Nothing here waits, does I/O or knows about time. The owner of the map is the `silo.volume.Volume`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from silo.errors import InvalidRequestError

__all__ = [
    "DIRTY_BITS",
    "FROZEN",
    "LOCKED",
    "MIGRATION_DIRTY",
    "RESIDENCY_MASK",
    "SYNC_DIRTY",
    "SYNC_IN_CUT",
    "WINDOW",
    "ChunkMap",
    "Indices",
    "Residency",
    "after_restart",
    "indices_of",
    "is_even",
    "join_indices",
    "runs_of",
    "runs_where",
]

Indices = npt.NDArray[np.int64]


class Residency(enum.IntEnum):
    """Where the newest content of a chunk is. The order matters: from ``ZERO`` on it is known locally."""

    ABSENT_STORE = 0
    """Only in the store."""
    ABSENT_PEER = 1
    """Only at the source of a migration. Never to be read from the store: that would be older."""
    ZERO = 2
    """All zeros, and the device reads as zeros too."""
    ZERO_UNPUNCHED = 3
    """All zeros, while the device still holds other bytes."""
    PRESENT = 4
    """On the device."""


RESIDENCY_MASK = 0x07
LOCKED = 0x08
FROZEN = 0x10
SYNC_DIRTY = 0x20
SYNC_IN_CUT = 0x40
MIGRATION_DIRTY = 0x80
DIRTY_BITS = SYNC_DIRTY | SYNC_IN_CUT | MIGRATION_DIRTY

WINDOW_SHIFT = 12
WINDOW = 1 << WINDOW_SHIFT
STRETCH = 64
"""Neighbouring windows that are looked at together: what numpy works on then stays in the processor's caches."""


def runs_of(indices: Indices) -> list[tuple[int, int]]:
    """Ascending chunk indices as ``(first, limit)`` runs of neighbours."""
    if len(indices) == 0:
        return []
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    firsts = indices[np.concatenate(([0], breaks))]
    lasts = indices[np.concatenate((breaks - 1, [len(indices) - 1]))]
    return [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]


def is_even(states: npt.NDArray[np.uint8]) -> bool:
    """Whether all of them are the same. Usually they are, or differ at once: disks are full and empty in long runs."""
    return bool(states[0] == states[-1]) and bool((states == states[0]).all())


def runs_where(wanted: npt.NDArray[np.bool_], first: int = 0) -> list[tuple[int, int]]:
    """The runs in which ``wanted`` is true, as chunks of which ``first`` is the one that it begins with."""
    if not len(wanted):
        return []
    edges = (np.flatnonzero(wanted[1:] != wanted[:-1]) + (first + 1)).tolist()
    if wanted[0]:
        edges.insert(0, first)
    if wanted[-1]:
        edges.append(first + len(wanted))
    return list(zip(edges[::2], edges[1::2], strict=True))


def indices_of(runs: Iterable[tuple[int, int]]) -> Indices:
    """The inverse of `runs_of`."""
    return join_indices(np.arange(first, limit, dtype=np.int64) for first, limit in runs)


def join_indices(parts: Iterable[Indices]) -> Indices:
    """One array from many, also from none."""
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _matches(states: npt.NDArray[np.uint8], bits: int, mask: int, value: int) -> npt.NDArray[np.bool_]:
    matches: npt.NDArray[np.bool_] = (states & bits != 0) & (states & mask == value)
    return matches


def after_restart(states: npt.NDArray[np.uint8]) -> None:
    """Make the bytes that a dead process left meaningful again, in place. The page cache has survived.

    Nothing is in transition any more, no cut needs old content, and what was taken for a cut is dirty again
    because nobody knows whether the commit happened. A write may have been on its way to a ZERO chunk: it was
    marked or locked, and the device may hold a part of it.
    """
    zero = states & RESIDENCY_MASK == Residency.ZERO
    states[zero & (states & (LOCKED | DIRTY_BITS) != 0)] += Residency.ZERO_UNPUNCHED - Residency.ZERO
    taken = (states & SYNC_IN_CUT) >> 1
    states |= taken
    states &= np.uint8(0xFF & ~(LOCKED | FROZEN | SYNC_IN_CUT))


class ChunkMap:
    """The states of all chunks. Single-chunk access goes to ``states`` directly; many chunks go through methods.

    ``buffer`` holds one byte per chunk and is used in place. Whoever sets a dirty bit in ``states`` directly
    must also set it in ``summary[chunk >> WINDOW_SHIFT]``.
    """

    __slots__ = ("_summary_view", "count", "states", "summary", "view")

    def __init__(self, buffer: bytearray | memoryview, count: int) -> None:
        if len(buffer) != count:
            raise InvalidRequestError(f"{count} chunks need {count} bytes of state, not {len(buffer)}")
        self.count = count
        self.states = memoryview(buffer)
        self.view: npt.NDArray[np.uint8] = np.frombuffer(buffer, dtype=np.uint8)
        self.summary = bytearray((count + WINDOW - 1) >> WINDOW_SHIFT)
        self._summary_view: npt.NDArray[np.uint8] = np.frombuffer(self.summary, dtype=np.uint8)
        for window in range(0, len(self.summary), STRETCH):
            self._summarise(window, min(window + STRETCH, len(self.summary)))

    @classmethod
    def filled(cls, count: int, residency: Residency) -> ChunkMap:
        """A map in memory with every chunk clean and in one residency."""
        buffer = bytearray(count) if residency == 0 else bytearray([residency]) * count
        return cls(buffer, count)

    def _summarise(self, first: int, limit: int) -> npt.NDArray[np.uint8]:
        """Correct the summary of a run of windows; the dirty bits that occur in each."""
        found = np.empty(limit - first, dtype=np.uint8)
        whole = min(limit, self.count >> WINDOW_SHIFT)
        if whole > first:
            # Eight states at a time.
            words = self.view[first << WINDOW_SHIFT : whole << WINDOW_SHIFT].view(np.uint64)
            folded = np.bitwise_or.reduce(words.reshape(whole - first, -1), axis=1)
            found[: whole - first] = np.bitwise_or.reduce(folded.view(np.uint8).reshape(-1, 8), axis=1)
        if whole < limit:
            found[-1] = np.bitwise_or.reduce(self.view[whole << WINDOW_SHIFT :])
        found &= np.uint8(DIRTY_BITS)
        self._summary_view[first:limit] = found
        return found

    def _windows(self, first: int, limit: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        for window in range(first >> WINDOW_SHIFT, (limit + WINDOW - 1) >> WINDOW_SHIFT):
            low, high = max(first, window << WINDOW_SHIFT), min(limit, (window + 1) << WINDOW_SHIFT)
            yield window, self.view[low:high]

    def residency(self, chunk: int) -> Residency:
        """The residency of one chunk."""
        return Residency(self.states[chunk] & RESIDENCY_MASK)

    def set_residency(self, chunk: int, residency: Residency) -> None:
        """Change the residency of one chunk and leave its other bits alone."""
        self.states[chunk] = self.states[chunk] & ~RESIDENCY_MASK | residency

    def set_residency_run(self, first: int, limit: int, residency: Residency) -> None:
        """Change the residency of a run of chunks and leave their other bits alone."""
        states = self.view[first:limit]
        states[:] = states & np.uint8(0xFF & ~RESIDENCY_MASK) | np.uint8(residency)

    def mark(self, chunk: int, bits: int) -> None:
        """Set dirty bits of one chunk."""
        self.states[chunk] |= bits
        self.note(chunk, bits)

    def note(self, chunk: int, bits: int) -> None:
        """Say in the summary that dirty bits were set in the window of ``chunk``."""
        self.summary[chunk >> WINDOW_SHIFT] |= bits

    def note_run(self, first: int, limit: int, bits: int) -> None:
        """As `note`, for the windows of a run of chunks."""
        self._summary_view[first >> WINDOW_SHIFT : (limit - 1 >> WINDOW_SHIFT) + 1] |= np.uint8(bits)

    def mark_run(self, first: int, limit: int, bits: int) -> None:
        """Set dirty bits of a run of chunks."""
        self.view[first:limit] |= np.uint8(bits)
        self.note_run(first, limit, bits)

    def translate(self, first: int, limit: int, table: bytes) -> bool:
        """Let each state of a run become ``table[state]``, in one store each; whether any has changed.

        Says nothing to the summary. About 0.1 ms per million chunks in one state, and 1 ms for any others.
        """
        states = self.view[first:limit]
        if is_even(states):
            sample = int(states[0])
            states.fill(table[sample])
            return table[sample] != sample
        old = states.tobytes()
        new = old.translate(table)
        if new == old:
            return False
        states[:] = np.frombuffer(new, dtype=np.uint8)
        return True

    def mark_many(self, indices: Indices, bits: int) -> None:
        """Set dirty bits of any chunks."""
        self.view[indices] |= np.uint8(bits)
        for window in np.unique(indices >> WINDOW_SHIFT):
            self.summary[int(window)] |= bits

    def clear_many(self, indices: Indices, bits: int) -> None:
        """Clear bits of any chunks."""
        self.view[indices] &= np.uint8(0xFF & ~bits)

    def select(self, mask: int, value: int, first: int = 0, limit: int | None = None) -> Indices:
        """Ascending indices of the chunks whose state, masked, equals ``value``.

        Reads every byte between ``first`` and ``limit``: about 1 ms per million chunks.
        """
        stop = self.count if limit is None else limit
        return np.flatnonzero((self.view[first:stop] & mask) == value) + first

    def windows_with(self, mask: int, value: int) -> list[int]:
        """The windows of the map in which some chunk's state, masked, equals ``value``. Reads every byte."""
        return [
            window for window, states in self._windows(0, self.count) if bool((states & mask == value).any())
        ]

    def dirty_windows(self, bits: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """``(first, states)`` of windows that have any of the dirty ``bits``, ascending, neighbours joined.

        Costs what is dirty, not what exists: the summary says where to look, and is corrected where it is late.
        """
        for low, high in runs_of(np.flatnonzero(self._summary_view & np.uint8(bits))):
            for start in range(low, high, STRETCH):
                found = self._summarise(start, min(start + STRETCH, high))
                for first, limit in runs_of(np.flatnonzero(found & np.uint8(bits)) + start):
                    yield first << WINDOW_SHIFT, self.view[first << WINDOW_SHIFT : limit << WINDOW_SHIFT]

    def select_dirty(self, bits: int, mask: int = 0, value: int = 0) -> Indices:
        """Ascending indices of the chunks with any of the dirty ``bits`` and whose state, masked, equals ``value``.

        Takes the memory of the result and a window, because that can be every chunk there is.
        """
        sizes = (int(np.count_nonzero(_matches(s, bits, mask, value))) for _, s in self.dirty_windows(bits))
        found = np.empty(sum(sizes), dtype=np.int64)
        end = 0
        for first, states in self.dirty_windows(bits):
            part = np.flatnonzero(_matches(states, bits, mask, value))
            found[end : end + len(part)] = part
            found[end : end + len(part)] += first
            end += len(part)
        return found

    def count_dirty(self, bits: int) -> int:
        """How many chunks have any of the dirty ``bits``."""
        return sum(int(np.count_nonzero(states & bits)) for _, states in self.dirty_windows(bits))

    def count_residency(self) -> dict[Residency, int]:
        """How many chunks are in each residency. Reads every byte."""
        totals = np.zeros(RESIDENCY_MASK + 1, dtype=np.int64)
        step = WINDOW << 8
        for low in range(0, self.count, step):
            totals += np.bincount(self.view[low : low + step] & RESIDENCY_MASK, minlength=RESIDENCY_MASK + 1)
        return {residency: int(totals[residency]) for residency in Residency}

    def residency_runs(self, first: int, limit: int) -> list[tuple[int, int, Residency]]:
        """``(first, limit, residency)`` of neighbouring chunks in the same residency, covering the given run."""
        if limit <= first:
            return []
        values = self.view[first:limit] & RESIDENCY_MASK
        edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), limit - first]
        return [(low + first, high + first, Residency(int(values[low]))) for low, high in pairwise(edges)]
