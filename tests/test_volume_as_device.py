"""A volume keeps the contract of the device below it: the kit for devices, held against volumes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from silo.abc import BlockDevice, Buffer
from silo.chunkmap import ChunkMap, Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.errors import ClosedError
from silo.geometry import Geometry
from silo.group import Group
from silo.testing.check_device import check_device

SIZE = 300 * 4096 + 512
"""A short last chunk, and enough chunks for requests that touch many."""


class VolumeDevice(BlockDevice):
    """A volume, seen as a device."""

    def __init__(self, chunk_size: int, residency: Residency) -> None:
        geometry = Geometry(SIZE, chunk_size)
        self.size = SIZE
        self._group = Group("vm1", SystemClock())
        chunks = ChunkMap.filled(geometry.chunk_count, residency)
        self._volume = self._group.add("disk", MemoryDevice(SIZE), geometry, chunks=chunks)
        self._closed = False

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the volume was closed")

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        self._check()
        return self._volume.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self._check()
        return self._volume.write_nowait(offset, data)

    async def read(self, offset: int, length: int) -> Buffer:
        self._check()
        return bytes(await self._volume.read(offset, length))  # a volume's answer may be live, a device's not

    async def write(self, offset: int, data: Buffer) -> None:
        self._check()
        await self._volume.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        self._check()
        await self._volume.zero(offset, length)

    def zero_nowait(self, offset: int, length: int) -> bool:
        self._check()
        return self._volume.zero_nowait(offset, length)

    async def flush(self) -> None:
        self._check()
        await self._volume.flush()

    async def data_extents(self) -> Sequence[tuple[int, int]]:
        self._check()
        geometry = self._volume.geometry
        return [
            (
                first << geometry.chunk_shift,
                min(limit << geometry.chunk_shift, SIZE) - (first << geometry.chunk_shift),
            )
            for first, limit, residency in self._volume.chunks.residency_runs(0, geometry.chunk_count)
            if residency is Residency.PRESENT
        ]

    async def aclose(self) -> None:
        self._closed = True
        await self._group.aclose()


@pytest.mark.parametrize("chunk_size", [4096, 65536, 1 << 20])
@pytest.mark.parametrize("residency", [Residency.PRESENT, Residency.ZERO])
async def test_contract(chunk_size: int, residency: Residency) -> None:
    """Whatever the chunks, and whether the disk began as zeros or as what the device held."""

    async def make_device() -> VolumeDevice:
        return VolumeDevice(chunk_size, residency)

    await check_device(make_device)
