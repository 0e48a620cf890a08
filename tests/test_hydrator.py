"""Hydration in the background: it goes on after every failure, says what keeps it, and ends when it is told to."""

from __future__ import annotations

import asyncio

import pytest

from silo.abc import ChunkSource
from silo.chunkmap import ChunkMap, Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.errors import CapacityError, ClosedError, CorruptionError, SiloError, UnavailableError
from silo.geometry import Geometry
from silo.group import Group
from silo.hydrator import Hydrator

CHUNK = 65536
COUNT = 8


class Failing(ChunkSource):
    """Answers with an error as often as it was told to, and then with content."""

    def __init__(self, *errors: SiloError) -> None:
        self.errors = list(errors)
        self.asked: list[int] = []

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> bytes:
        assert not demand
        self.asked.append(chunk)
        if self.errors:
            raise self.errors.pop()
        return bytes([chunk + 1]) * CHUNK


def absent_group(source: ChunkSource) -> Group:
    """A group of which nothing is here."""
    group = Group("vm1", SystemClock())
    chunks = ChunkMap.filled(COUNT, Residency.ABSENT_STORE)
    volume = group.add("disk", MemoryDevice(COUNT * CHUNK), Geometry(COUNT * CHUNK, CHUNK), chunks=chunks)
    volume.set_source(Residency.ABSENT_STORE, source)
    return group


@pytest.mark.parametrize(
    "error", [UnavailableError("away"), CorruptionError("damaged"), CapacityError("the disk is full")]
)
async def test_it_goes_on_after_a_failure(error: SiloError) -> None:
    """Whatever went wrong once is tried again, and what is there in the end is right."""
    source = Failing(error)
    group = absent_group(source)
    hydrator = Hydrator(group, SystemClock())
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(hydrator.run())
        await hydrator.wait_done()
    assert len(source.asked) == COUNT + 1
    assert hydrator.error == ""
    for chunk in range(COUNT):
        assert bytes(await group.volumes["disk"].read(chunk * CHUNK, 1)) == bytes([chunk + 1])


async def test_it_says_why_it_makes_no_progress() -> None:
    """For as long as it does not, and guests are not disturbed by it."""
    source = Failing(*(UnavailableError("the store is away") for _ in range(1000)))
    hydrator = Hydrator(absent_group(source), SystemClock())
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(hydrator.run())
        while not hydrator.error:
            await asyncio.sleep(0.01)
        assert "the store is away" in hydrator.error
        running.cancel()


async def test_who_waits_for_a_closed_one_is_told() -> None:
    """And not left waiting for ever; one that was done stays done."""
    hydrator = Hydrator(absent_group(Failing()), SystemClock())
    asyncio.get_running_loop().call_soon(hydrator.close)
    async with asyncio.timeout(20):
        with pytest.raises(ClosedError):
            await hydrator.wait_done()
    done = Hydrator(Group("vm2", SystemClock()), SystemClock())
    async with asyncio.timeout(20):
        await done.run()
        done.close()
        await done.wait_done()
    assert done.error == ""
