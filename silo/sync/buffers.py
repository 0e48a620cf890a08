"""Memory for contents on their way to the store, used again and again.

A gigabyte that is copied into fresh memory costs three times what it costs in memory that is there already: the
kernel hands out every page anew, and clears it first. So contents are read into buffers of one size, and a buffer
comes back when the last segment that refers to it is stored.

Coming back is an optimisation and nothing else. A buffer that may still be read by somebody (a request that was
given up, whose bytes may yet be on their way) is simply not returned, and goes when its last reader lets go.
One event loop, no awaits.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from silo.abc import Buffer

__all__ = ["BufferPool", "Lease", "joined"]

IDLE_MAX = 4
"""Buffers that are kept between two cuts."""


class Lease:
    """A buffer in use. Made by `BufferPool.take`, with one user; the last one to `drop` it gives it back."""

    def __init__(self, pool: BufferPool, memory: mmap.mmap) -> None:
        self.view = memoryview(memory)
        self._pool = pool
        self._memory = memory
        self._users = 1

    def hold(self) -> None:
        """One user more."""
        self._users += 1

    def drop(self) -> None:
        """One user less. Nobody may read the buffer on behalf of this one any more."""
        self._users -= 1
        if self._users == 0:
            self._pool.put_back(self._memory)


class BufferPool:
    """Buffers of ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._idle: list[mmap.mmap] = []

    def take(self, size: int) -> Lease:
        """A buffer of at least ``size`` bytes, with any content."""
        if size > self._size:
            return Lease(self, _map(size))
        return Lease(self, self._idle.pop() if self._idle else _map(self._size))

    def put_back(self, memory: mmap.mmap) -> None:
        """Nobody reads this buffer any more."""
        if len(memory) == self._size:
            self._idle.append(memory)

    def trim(self) -> None:
        """A cut is over: keep only what the next one begins with."""
        del self._idle[IDLE_MAX:]


def joined(buffers: Sequence[Buffer]) -> list[Buffer]:
    """The same bytes in as few buffers as possible: views of one memory that lie side by side become one.

    A store's client handles each buffer apart, so that hundreds of small ones cost more than what is in them.
    """
    found: list[Buffer] = []
    memory: object = None
    base = end = 0
    for buffer in buffers:
        if not isinstance(buffer, memoryview) or not isinstance(buffer.obj, mmap.mmap):
            memory = None
            found.append(buffer)
            continue
        start, length = _address(buffer), len(buffer)
        if buffer.obj is memory and start == end:
            buffer = memoryview(buffer.obj)[start - base - len(found.pop()) : start - base + length]
        elif buffer.obj is not memory:
            memory, base = buffer.obj, _address(memoryview(buffer.obj))
        end = start + length
        found.append(buffer)
    return found


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])


def _map(size: int) -> mmap.mmap:
    """Memory that costs nothing where it is not used."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
