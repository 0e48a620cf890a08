"""The device in anonymous memory."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from silo.devices.memory import MemoryDevice
from silo.errors import InvalidRequestError
from silo.testing.check_device import check_device

TIB = 1 << 40
MIB = 1 << 20


def resident() -> int:
    """How many bytes of memory this process uses now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("size", [256 << 10, 5 * MIB + 512])
async def test_contract(size: int) -> None:
    async def make() -> MemoryDevice:
        return MemoryDevice(size)

    await check_device(make)


async def test_a_large_device_costs_nothing_until_it_is_written() -> None:
    """A tebibyte can be opened, read, zeroed and written at its end for a few pages."""
    before = resident()
    device = MemoryDevice(TIB)
    assert bytes(device.read_nowait(TIB // 2, 4096)) == bytes(4096)
    assert device.write_nowait(TIB - 4096, b"x" * 4096)
    await device.zero(0, TIB // 1024)
    assert await device.data_extents() == [(TIB - 2 * MIB, 2 * MIB)]
    assert resident() - before < 16 * MIB
    await device.aclose()


async def test_read_nowait_is_a_view() -> None:
    """No copy is made: a later write shows through the buffer."""
    device = MemoryDevice(MIB)
    view = device.read_nowait(4096, 5)
    device.write_nowait(4096, b"hello")
    assert view == b"hello"
    await device.aclose()


async def test_zero_gives_memory_back() -> None:
    device = MemoryDevice(64 * MIB)
    device.write_nowait(0, b"x" * (64 * MIB))
    written = resident()
    await device.zero(0, 64 * MIB)
    assert written - resident() > 60 * MIB
    assert await device.data_extents() == []
    assert bytes(device.read_nowait(0, 64 * MIB)) == bytes(64 * MIB)
    await device.aclose()


async def test_data_extents_join_neighbouring_regions() -> None:
    device = MemoryDevice(11 * MIB)
    for offset in (2 * MIB, 4 * MIB, 10 * MIB + 5):
        device.write_nowait(offset, b"x")
    assert await device.data_extents() == [(2 * MIB, 4 * MIB), (10 * MIB, MIB)]
    device.write_nowait(6 * MIB - 1, b"over the edge")
    assert await device.data_extents() == [(2 * MIB, 6 * MIB), (10 * MIB, MIB)]
    device.zero_nowait(2 * MIB, 2 * MIB)
    assert await device.data_extents() == [(4 * MIB, 4 * MIB), (10 * MIB, MIB)]
    await device.aclose()


async def test_zero_nowait_declines_what_takes_long() -> None:
    device = MemoryDevice(256 * MIB)
    device.write_nowait(200 * MIB, b"x")
    assert not device.zero_nowait(0, 256 * MIB)
    assert device.read_nowait(200 * MIB, 1) == b"x"
    await device.aclose()


async def test_a_view_outlives_the_device() -> None:
    """Closing while a reply is still being sent from the memory neither fails nor pulls it away."""
    device = MemoryDevice(MIB)
    device.write_nowait(0, b"hello")
    view = device.read_nowait(0, 5)
    await device.aclose()
    assert view == b"hello"


@pytest.mark.parametrize("size", [0, -1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(InvalidRequestError):
        MemoryDevice(size)
