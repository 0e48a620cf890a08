"""The kit that holds devices to the port's contract: it must catch whoever breaks a sentence of it."""

from __future__ import annotations

import asyncio

import pytest

from silo.abc import BlockDevice, Buffer
from silo.devices.memory import MemoryDevice
from silo.errors import UnavailableError
from silo.testing.check_device import check_device

SIZE = 1 << 20


class LandsAfterCancellation(MemoryDevice):
    """As a device on ``asyncio.to_thread``: cancelled, its write happens all the same, later."""

    async def write(self, offset: int, data: Buffer) -> None:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._land_later(10, offset, bytes(data))
            raise
        super().write_nowait(offset, data)

    def _land_later(self, turns: int, offset: int, data: bytes) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._land_later, turns - 1, offset, data)
        elif not self._closed:
            super().write_nowait(offset, data)


class DiesWhenAReadIsCancelled(MemoryDevice):
    """A cancelled read leaves the device locked for ever."""

    busy = False

    async def read(self, offset: int, length: int) -> bytes:
        if self.busy:
            raise UnavailableError("an earlier read never ended")
        self.busy = True
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.busy = False
        return bytes(self.read_nowait(offset, length))


class ReadsLiveMemory(MemoryDevice):
    async def read(self, offset: int, length: int) -> memoryview:  # type: ignore[override]
        return self.read_nowait(offset, length)


class HasOneReadBuffer(MemoryDevice):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.buffer = bytearray(size)

    def read_nowait(self, offset: int, length: int) -> memoryview:
        self.buffer[:length] = super().read_nowait(offset, length)
        return memoryview(self.buffer)[:length]

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(super().read_nowait(offset, length))


class DeclinesHalfWay(MemoryDevice):
    def write_nowait(self, offset: int, data: Buffer) -> bool:
        super().write_nowait(offset, data[: len(data) // 2])
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        super().write_nowait(offset, data)


class ZeroesDeclinedExtents(MemoryDevice):
    def zero_nowait(self, offset: int, length: int) -> bool:
        super().zero_nowait(offset, length)
        return False


class ZeroesWholePages(MemoryDevice):
    async def zero(self, offset: int, length: int) -> None:
        first, limit = offset // 4096 * 4096, -(-(offset + length) // 4096) * 4096
        await super().zero(first, min(limit, self.size) - first)


class ForgetsToZeroTheEnd(MemoryDevice):
    def zero_nowait(self, offset: int, length: int) -> bool:
        return super().zero_nowait(offset, length // 4096 * 4096)

    async def zero(self, offset: int, length: int) -> None:
        await super().zero(offset, length // 4096 * 4096)


class WritesBackWholePages(MemoryDevice):
    """Read, modify, write with somebody else's turn in between."""

    async def write(self, offset: int, data: Buffer) -> None:
        first, limit = offset // 4096 * 4096, min(-(-(offset + len(data)) // 4096) * 4096, self.size)
        pages = bytearray(self.read_nowait(first, limit - first))
        await asyncio.sleep(0)
        pages[offset - first : offset - first + len(data)] = data
        super().write_nowait(first, pages)


class MixesOverlappingWrites(MemoryDevice):
    async def write(self, offset: int, data: Buffer) -> None:
        before = bytes(self.read_nowait(offset, len(data)))
        await asyncio.sleep(0)
        if bytes(self.read_nowait(offset, len(data))) != before:
            data = bytes(len(data))
        super().write_nowait(offset, data)


class KeepsTheBuffer(MemoryDevice):
    """Writes it when the next call comes."""

    late: tuple[int, Buffer] | None = None

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        self._settle()
        self.late = (offset, data)

    async def read(self, offset: int, length: int) -> bytes:
        self._settle()
        return await super().read(offset, length)

    def read_nowait(self, offset: int, length: int) -> memoryview:
        self._settle()
        return super().read_nowait(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        self._settle()
        await super().zero(offset, length)

    def zero_nowait(self, offset: int, length: int) -> bool:
        self._settle()
        return super().zero_nowait(offset, length)

    def _settle(self) -> None:
        if self.late is not None:
            super().write_nowait(*self.late)
            self.late = None


class LosesTheLastByte(MemoryDevice):
    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return super().write_nowait(offset, data[: self.size - 1 - offset])


class HidesData(MemoryDevice):
    async def data_extents(self) -> list[tuple[int, int]]:
        self._check_open()
        return [(0, 4096)]


class ListsExtentsBackwards(MemoryDevice):
    async def data_extents(self) -> list[tuple[int, int]]:
        self._check_open()
        return [(SIZE // 2, SIZE // 2), (0, SIZE // 2)]


class WorksAfterClosing(MemoryDevice):
    async def flush(self) -> None:
        pass


class StartsDirty(MemoryDevice):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.write_nowait(0, b"left over")


BROKEN = [
    LandsAfterCancellation,
    DiesWhenAReadIsCancelled,
    ReadsLiveMemory,
    HasOneReadBuffer,
    DeclinesHalfWay,
    ZeroesDeclinedExtents,
    ZeroesWholePages,
    ForgetsToZeroTheEnd,
    WritesBackWholePages,
    MixesOverlappingWrites,
    KeepsTheBuffer,
    LosesTheLastByte,
    HidesData,
    ListsExtentsBackwards,
    WorksAfterClosing,
    StartsDirty,
]


@pytest.mark.parametrize("device", BROKEN)
async def test_whoever_breaks_the_contract_is_caught(device: type[MemoryDevice]) -> None:
    async def make() -> BlockDevice:
        return device(SIZE)

    with pytest.raises(AssertionError) as caught:
        await check_device(make)
    assert any("seed 0" in note for note in caught.value.__notes__)


async def test_a_flush_that_keeps_nothing_is_caught() -> None:
    async def make() -> BlockDevice:
        return MemoryDevice(SIZE)

    async def reopen(device: BlockDevice) -> BlockDevice:
        return MemoryDevice(device.size)

    await check_device(make)
    with pytest.raises(AssertionError, match="after opening again"):
        await check_device(make, reopen=reopen)


@pytest.mark.parametrize("seed", range(5))
async def test_a_good_device_passes_whatever_the_seed(seed: int) -> None:
    made = 0

    async def make() -> BlockDevice:
        nonlocal made
        made += 1
        return MemoryDevice(SIZE)

    await check_device(make, seed=seed)
    assert made == 15
