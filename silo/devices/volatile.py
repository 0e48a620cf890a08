"""A device in memory with a write cache that a power loss empties: it lets a simulation ask what survives.

Reads see the newest content. Beside it lies the *medium*, the content as of the last flush, and the list of the
mutations since. After a power loss a disk holds, for every block, any one of the contents that the block had
since the last flush: the cache may have been written back at any moment, block by block, in any order, and a
write of several blocks may have landed in part. `VolatileDevice.power_loss` draws one such image. It never tears
inside a block.

Every call takes effect at once. To let writes and flushes overlap, put a `silo.devices.delayed.DelayedDevice`
around it: its mutations take effect halfway through their waiting.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from silo.abc import Buffer
from silo.devices.layer import Chance, Layer
from silo.devices.memory import MemoryDevice
from silo.geometry import BLOCK_SIZE_DEFAULT
from silo.zeros import zeros

__all__ = ["VolatileDevice"]


@attrs.frozen(eq=False)
class _Mutation:
    offset: int
    length: int
    data: bytes | None
    """``None`` for zeros."""

    def pieces(self, block_size: int) -> Iterator[tuple[int, int, Buffer]]:
        """``(block, offset, bytes)``, one for every block that it touches."""
        start, end = self.offset, self.offset + self.length
        while start < end:
            block = start // block_size
            limit = min((block + 1) * block_size, end)
            piece = (
                zeros(limit - start)
                if self.data is None
                else self.data[start - self.offset : limit - self.offset]
            )
            yield block, start, piece
            start = limit

    def apply(self, device: MemoryDevice) -> None:
        if self.data is not None:
            device.write_nowait(self.offset, self.data)
            return
        step = 64 << 20  # what zero_nowait does in one call
        for start in range(self.offset, self.offset + self.length, step):
            device.zero_nowait(start, min(step, self.offset + self.length - start))


class VolatileDevice(Layer):
    """``size`` bytes of memory, all zeros and flushed at first. Concurrent calls are allowed."""

    inner: MemoryDevice

    def __init__(self, size: int, *, block_size: int = BLOCK_SIZE_DEFAULT) -> None:
        super().__init__(MemoryDevice(size))
        self.block_size = block_size
        self._medium = MemoryDevice(size)
        self._unsynced: list[_Mutation] = []

    def __repr__(self) -> str:
        return f"VolatileDevice({self.size})"

    read_nowait = Layer.read_nowait
    read = Layer.read
    data_extents = Layer.data_extents

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self.inner.write_nowait(offset, data)
        self._unsynced.append(_Mutation(offset, len(data), bytes(data)))
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        self.write_nowait(offset, data)

    def zero_nowait(self, offset: int, length: int) -> bool:
        mutation = _Mutation(offset, length, None)
        mutation.apply(self.inner)
        self._unsynced.append(mutation)
        return True

    async def zero(self, offset: int, length: int) -> None:
        self.zero_nowait(offset, length)

    async def flush(self) -> None:
        await self.inner.flush()
        for mutation in self._unsynced:
            mutation.apply(self._medium)
        self._unsynced.clear()

    async def aclose(self) -> None:
        """Close what reads and writes use. The medium stays, so `power_loss` still answers."""
        await self.inner.aclose()

    @property
    def unsynced(self) -> int:
        """How many mutations a power loss could undo."""
        return len(self._unsynced)

    async def power_loss(self, chance: Chance) -> VolatileDevice:
        """A new device that holds what could be left if the power failed now. This one is not changed.

        How much of the cache was written back is drawn first, so that *nothing* and *everything* are as likely
        as a mixture.
        """
        survivor = VolatileDevice(self.size, block_size=self.block_size)
        for image in (survivor.inner, survivor._medium):
            for offset, length in await self._medium.data_extents():
                image.write_nowait(offset, self._medium.read_nowait(offset, length))
        versions: dict[int, list[tuple[int, Buffer]]] = {}
        for mutation in self._unsynced:
            for block, offset, piece in mutation.pieces(self.block_size):
                versions.setdefault(block, []).append((offset, piece))
        share = min(1.0, max(0.0, 2 * chance() - 0.5))
        for pieces in versions.values():
            # The last version that was written back, if any; its predecessors lie below it.
            written_back = int(chance() * len(pieces)) + 1 if chance() < share else 0
            for offset, piece in pieces[:written_back]:
                survivor.inner.write_nowait(offset, piece)
                survivor._medium.write_nowait(offset, piece)
        return survivor
