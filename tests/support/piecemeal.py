"""A layer that does slow calls piece by piece, as a disk does: others see them half done."""

from __future__ import annotations

import asyncio

from silo.abc import BlockDevice, Buffer
from silo.devices.layer import Layer


class PiecemealDevice(Layer):
    """``inner``; an asynchronous read, write or zeroing goes ``piece`` by ``piece`` and lets others run in between."""

    def __init__(self, inner: BlockDevice, piece: int) -> None:
        super().__init__(inner)
        self.piece = piece

    async def read(self, offset: int, length: int) -> Buffer:
        parts = []
        for start, size in self._pieces(offset, length):
            parts.append(bytes(await self.inner.read(start, size)))
            await asyncio.sleep(0)
        return b"".join(parts)

    async def write(self, offset: int, data: Buffer) -> None:
        for start, size in self._pieces(offset, len(data)):
            await asyncio.sleep(0)
            await self.inner.write(start, data[start - offset : start - offset + size])

    async def zero(self, offset: int, length: int) -> None:
        for start, size in self._pieces(offset, length):
            await asyncio.sleep(0)
            await self.inner.zero(start, size)

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [
            (start, min(self.piece, offset + length - start))
            for start in range(offset, offset + length, self.piece)
        ]

    read_nowait = Layer.read_nowait
    write_nowait = Layer.write_nowait
    zero_nowait = Layer.zero_nowait
    flush = Layer.flush
    data_extents = Layer.data_extents
    aclose = Layer.aclose
