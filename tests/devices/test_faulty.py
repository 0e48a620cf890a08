"""The layer that fails on command."""

from __future__ import annotations

import pytest

from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.memory import MemoryDevice
from silo.errors import CapacityError, InvalidRequestError, UnavailableError
from silo.testing.check_device import check_device

SIZE = 1 << 20


async def test_contract_while_nothing_fails() -> None:
    async def make() -> FaultyDevice:
        return FaultyDevice(MemoryDevice(SIZE))

    await check_device(make)


async def test_the_nth_call_of_a_verb_fails_once() -> None:
    device = FaultyDevice(MemoryDevice(SIZE))
    device.fail(Verb.WRITE, nth=2)
    assert device.write_nowait(0, b"a")
    await device.read(0, 1)
    with pytest.raises(UnavailableError, match="told to"):
        await device.write(0, b"b")
    assert await device.read(0, 1) == b"a"
    await device.write(0, b"c")
    assert await device.read(0, 1) == b"c"
    await device.aclose()


async def test_a_torn_write_lands_in_part() -> None:
    """Both speeds, and zeroing too."""
    device = FaultyDevice(MemoryDevice(SIZE))
    device.fail(Verb.WRITE, torn=512)
    with pytest.raises(UnavailableError):
        await device.write(0, b"a" * 1024)
    device.fail(Verb.WRITE, torn=100)
    with pytest.raises(UnavailableError):
        device.write_nowait(4096, b"b" * 1024)
    device.fail(Verb.ZERO, torn=2)
    with pytest.raises(UnavailableError):
        device.zero_nowait(0, 10)
    device.fail(Verb.ZERO, torn=1)
    with pytest.raises(UnavailableError):
        await device.zero(4096, 10)
    assert await device.read(0, 1024) == b"\0\0" + b"a" * 510 + bytes(512)
    assert await device.read(4096, 1024) == b"\0" + b"b" * 99 + bytes(924)
    await device.aclose()


async def test_a_fault_can_last() -> None:
    device = FaultyDevice(MemoryDevice(SIZE))
    device.fail(Verb.FLUSH, nth=2, for_ever=True, error=lambda: CapacityError("full"))
    await device.flush()
    for _ in range(3):
        with pytest.raises(CapacityError, match="full"):
            await device.flush()
    device.heal()
    await device.flush()
    await device.aclose()


async def test_a_sweep_over_every_call_ends() -> None:
    """Fail the first call, then the second, and so on; every call is hit once, and then none is left."""
    struck = []
    nth = 1
    while True:
        device = FaultyDevice(MemoryDevice(SIZE))
        device.fail(nth=nth)
        try:
            device.read_nowait(0, 1)
            await device.read(0, 1)
            device.write_nowait(0, b"x")
            device.zero_nowait(0, 1)
            await device.flush()
        except UnavailableError:
            struck.append(device.calls)
        pending = device.pending
        await device.aclose()
        if pending:
            break
        nth += 1
    assert struck == [1, 2, 3, 4, 5]


async def test_there_is_no_call_number_nought() -> None:
    device = FaultyDevice(MemoryDevice(SIZE))
    with pytest.raises(InvalidRequestError):
        device.fail(nth=0)
    await device.aclose()
