"""Who has a chunk while the device is busy with it.

Between two awaits nobody needs a lock. An asynchronous device phase is longer than that, and for its time the chunk
belongs to it in one of two ways:

* **locked** (the ``LOCKED`` bit of the map): a fill, a punch, a copy aside, or a guest write to a chunk that is not
  PRESENT, whose residency changes at the end. Everybody else waits;
* **written**: a guest write to a PRESENT chunk, whose residency stays. Other writes go on beside it, and so does
  everything else except what would change the residency under it: zeroing and invalidation wait.

A chunk in either is *busy*. Nobody waits for one while holding another, so there is no order to keep and no deadlock:
a write takes all of its chunks in one step, when none of them is in the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from silo.chunkmap import LOCKED, RESIDENCY_MASK, ChunkMap, Residency
from silo.errors import InvariantError

__all__ = ["ChunkLocks"]


class ChunkLocks:
    """The locks of one volume, on its map. Belongs to the group's event loop."""

    def __init__(self, chunks: ChunkMap) -> None:
        self._chunks = chunks
        self._writers: dict[int, int] = {}
        self._waiting: dict[int, asyncio.Event] = {}

    @property
    def written(self) -> list[int]:
        """The PRESENT chunks with a guest write in its device phase."""
        return list(self._writers)

    def is_written(self, chunk: int) -> bool:
        """Whether a chunk is one of those."""
        return chunk in self._writers

    @contextmanager
    def locked(self, first: int, limit: int) -> Iterator[None]:
        """Lock a run of chunks, none of which may be locked."""
        states = self._chunks.view[first:limit]
        if bool((states & LOCKED).any()):
            raise InvariantError(f"a chunk from {first} to {limit - 1} was locked twice")
        states |= LOCKED
        try:
            yield
        finally:
            states &= ~LOCKED & 0xFF
            for chunk in [chunk for chunk in self._waiting if first <= chunk < limit]:
                self._wake(chunk)

    @contextmanager
    def writing(self, first: int, limit: int) -> Iterator[None]:
        """Take a run of chunks for a guest write: share what is PRESENT, lock the rest. None may be locked."""
        states = self._chunks.states
        present = [c for c in range(first, limit) if states[c] & RESIDENCY_MASK == Residency.PRESENT]
        if any(state & LOCKED for state in states[first:limit]):
            raise InvariantError(f"a chunk from {first} to {limit - 1} was locked twice")
        for chunk in present:
            self._writers[chunk] = self._writers.get(chunk, 0) + 1
        others = sorted(set(range(first, limit)).difference(present))
        for chunk in others:
            states[chunk] |= LOCKED
        try:
            yield
        finally:
            for chunk in present:
                self._end_writing(chunk)
            for chunk in others:
                states[chunk] &= ~LOCKED & 0xFF
                self._wake(chunk)

    def _end_writing(self, chunk: int) -> None:
        left = self._writers.pop(chunk) - 1
        if left:
            self._writers[chunk] = left
        else:
            self._wake(chunk)

    def _wake(self, chunk: int) -> None:
        waiting = self._waiting.pop(chunk, None)
        if waiting is not None:
            waiting.set()

    def busy(self, first: int, limit: int) -> int | None:
        """A busy chunk of the run, if there is one."""
        if bool((self._chunks.view[first:limit] & LOCKED).any()):
            return int(self._chunks.select(LOCKED, LOCKED, first, limit)[0])
        return next((chunk for chunk in self._writers if first <= chunk < limit), None)

    async def wait(self, chunk: int) -> None:
        """Return when a device phase on a busy chunk has ended; look again then.

        No deadline: each phase is one device call, which cannot be shortened.
        """
        await self._waiting.setdefault(chunk, asyncio.Event()).wait()
