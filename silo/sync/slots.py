"""A sparse array of slots: 56 bytes per chunk of address space, and memory only for what is used.

The slots lie in an unlinked file that is mapped. The kernel keeps in its page cache what is used, and may write it
out; a hole costs nothing. Space is taken a *piece* at a time, and before it is touched: a full disk must end in
`CapacityError`, not in the signal that a mapped hole without room would raise. A hole is never read through the
mapping either, since that would fill it with pages of zeros.

Slots that were never written, or were cleared, read as all zero bits. No awaits, no locks: one event loop.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from silo.chunkmap import Indices, runs_of
from silo.errors import CapacityError, ClosedError
from silo.sync.mappage import SLOT, Slots

__all__ = ["SparseSlots"]

PIECE = 16 * 1024
"""A multiple of the page size of every machine that matters; 292 slots."""

SIZE = SLOT.itemsize


class SparseSlots:
    """``count`` slots. ``directory`` holds the file; on a tmpfs it counts as memory."""

    def __init__(self, count: int, directory: str | None = None) -> None:
        self._closed = False
        pieces = -(-count * SIZE // PIECE)
        self._file = tempfile.TemporaryFile(prefix="silo-map-", dir=directory)  # noqa: SIM115 (closed by close)
        os.ftruncate(self._file.fileno(), pieces * PIECE)
        self._mapping = mmap.mmap(self._file.fileno(), pieces * PIECE)
        self._slots: Slots = np.frombuffer(self._mapping, dtype=SLOT, count=count)
        self._present: npt.NDArray[np.bool_] = np.zeros(pieces, dtype=np.bool_)

    @property
    def file_bytes(self) -> int:
        """What is used of the file system, in memory or on disk as the kernel sees fit."""
        return os.fstat(self._file.fileno()).st_blocks * 512

    def close(self) -> None:
        """Give the space back. Twice is harmless; every other call afterwards raises `ClosedError`."""
        self._closed = True
        self._slots = np.zeros(0, dtype=SLOT)  # the mapping ends with its last view
        self._file.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("a map was asked after it had been closed")

    # ---- reading ------------------------------------------------------------------------------------------

    def get(self, index: int) -> np.void | None:
        """One slot; ``None`` when it is zero because there is nothing."""
        self._check_open()
        start = index * SIZE
        if self._present[start // PIECE] and self._present[(start + SIZE - 1) // PIECE]:
            return self._slots[index]  # type: ignore[no-any-return]
        return None

    def gather(self, indices: Indices) -> Slots:
        """A copy of some slots."""
        self._check_open()
        start = indices * SIZE
        there = self._present[start // PIECE] & self._present[(start + SIZE - 1) // PIECE]
        found = np.zeros(len(indices), dtype=SLOT)
        found[there] = self._slots[indices[there]]
        return found

    def read(self, first: int, limit: int) -> Slots:
        """A copy of a run of slots."""
        found = np.zeros(limit - first, dtype=SLOT)
        for low, high in self._spans(first, limit):
            found[low - first : high - first] = self._slots[low:high]
        return found

    def kinds(self, first: int, limit: int) -> npt.NDArray[np.uint8]:
        """A copy of the kinds of a run of slots."""
        found = np.zeros(limit - first, dtype=np.uint8)
        for low, high in self._spans(first, limit):
            found[low - first : high - first] = self._slots["kind"][low:high]
        return found

    def is_hole(self, first: int, limit: int) -> bool:
        """Whether nothing at all is there, and everything reads as zero. False does not mean the opposite."""
        self._check_open()
        low, high = _pieces_of(first, limit)
        return not bool(self._present[low:high].any())

    def _spans(self, first: int, limit: int) -> Iterator[tuple[int, int]]:
        """Runs of slots that lie wholly in pieces that are there. All others are zero: a slot was written only
        after both of its pieces had been reserved."""
        self._check_open()
        low, high = _pieces_of(first, limit)
        for start, stop in runs_of(np.flatnonzero(self._present[low:high]) + low):
            span = max(first, -(-start * PIECE // SIZE)), min(limit, stop * PIECE // SIZE)
            if span[0] < span[1]:
                yield span

    # ---- writing ------------------------------------------------------------------------------------------

    def reserve(self, indices: Indices) -> None:
        """Make sure that these slots can be written. `CapacityError` when the disk is full."""
        start = indices * SIZE
        self._reserve(np.concatenate((start // PIECE, (start + SIZE - 1) // PIECE)))

    def _reserve(self, pieces: Indices) -> None:
        self._check_open()
        missing = np.unique(pieces[~self._present[pieces]])
        for low, high in runs_of(missing):
            try:
                os.posix_fallocate(self._file.fileno(), low * PIECE, (high - low) * PIECE)
            except OSError as error:
                raise CapacityError(f"there is no room for the map of a volume: {error.strerror}") from None
            self._present[low:high] = True

    def put(self, indices: Indices, slots: Slots) -> None:
        """Write some slots. `CapacityError` as `reserve`, with nothing written."""
        self.reserve(indices)
        self._slots[indices] = slots

    def fill(self, first: int, limit: int, slot: Slots) -> None:
        """Write the same slot to a run. `CapacityError` as `reserve`, with nothing written."""
        self._reserve(np.arange(*_pieces_of(first, limit)))
        self._slots[first:limit] = slot

    def clear(self, first: int, limit: int) -> None:
        """Make a run zero, and give whole pieces back."""
        for low, high in self._spans(first, limit):
            self._slots[low:high] = np.zeros(1, dtype=SLOT)
        inner = -(-first * SIZE // PIECE), limit * SIZE // PIECE
        for start, stop in runs_of(np.flatnonzero(self._present[inner[0] : inner[1]]) + inner[0]):
            try:
                self._mapping.madvise(mmap.MADV_REMOVE, start * PIECE, (stop - start) * PIECE)
            except OSError:
                return  # the file system cannot make holes: zeros will do
            self._present[start:stop] = False


def _pieces_of(first: int, limit: int) -> tuple[int, int]:
    return first * SIZE // PIECE, -(-limit * SIZE // PIECE)
