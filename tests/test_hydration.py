"""Absent chunks: fetched once, by whoever needs them first, and never used when something newer is known of."""

from __future__ import annotations

import asyncio

import pytest

from silo.chunkmap import Residency
from silo.devices.memory import MemoryDevice
from silo.errors import CorruptionError, InvariantError, UnavailableError
from silo.hydration import HYDRATE_WINDOW
from tests.support.held import HeldDevice, everything_else, interleaved
from tests.support.volumes import CHUNK, DictSource, KeptMaps, make_volume, states

BLOCK = 512
OLD, NEW = b"o" * CHUNK, b"n" * CHUNK
ABSENT, PEER, ZERO, UNPUNCHED, PRESENT = Residency


class Slow(DictSource):
    """Answers when it is told to."""

    def __init__(self, content):
        super().__init__(content)
        self.go = asyncio.Event()
        self.error = None

    async def before_answer(self, chunk, demand):
        await self.go.wait()
        if self.error is not None:
            raise self.error


@interleaved
async def test_readers_share_one_fetch():
    """However many wait for a chunk, it is asked for once."""
    source = Slow({0: OLD})
    _, volume = make_volume(MemoryDevice(CHUNK), ABSENT)
    volume.set_source(ABSENT, source)
    async with asyncio.TaskGroup() as tasks:
        reads = [tasks.create_task(volume.read(0, BLOCK)) for _ in range(5)]
        tasks.create_task(volume.hydrate(0, demand=True))
        await everything_else()
        tasks.create_task(volume.hydrate(0))  # the background joins a demand
        await everything_else()
        source.go.set()
    assert source.asked == [(0, True)]
    assert [bytes(read.result()) for read in reads] == [OLD[:BLOCK]] * 5


@interleaved
async def test_a_demand_does_not_wait_behind_the_background():
    """S6: it does its own fetch, urgently; whichever comes second finds the chunk filled."""
    source = Slow({0: OLD})
    _, volume = make_volume(MemoryDevice(CHUNK), ABSENT)
    volume.set_source(ABSENT, source)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.hydrate(0))
        await everything_else()
        tasks.create_task(volume.read(0, 1))
        await everything_else()
        source.go.set()
    assert source.asked == [(0, False), (0, True)]
    assert volume.filled_bytes == CHUNK


@interleaved
async def test_waiters_share_the_error_of_a_fetch():
    """Each would have to wait for its own failure otherwise, one after the other. A later call tries again."""
    source = Slow({0: OLD})
    source.error = CorruptionError("the digest does not match")
    _, volume = make_volume(MemoryDevice(CHUNK), ABSENT)
    volume.set_source(ABSENT, source)
    failed = []

    async def read() -> None:
        with pytest.raises(CorruptionError):
            await volume.read(0, 1)
        failed.append(True)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(read())
        await everything_else()
        source.go.set()
    assert (len(failed), len(source.asked)) == (3, 1)
    source.error = None
    assert bytes(await volume.read(0, 1)) == OLD[:1]


@interleaved
async def test_a_cancelled_fetch_is_taken_over():
    """The one who fetched gives up; another one who waits fetches instead."""
    source = Slow({0: OLD})
    _, volume = make_volume(MemoryDevice(CHUNK), ABSENT)
    volume.set_source(ABSENT, source)
    async with asyncio.TaskGroup() as tasks:
        fetching = tasks.create_task(volume.hydrate(0, demand=True))
        await everything_else()
        waiting = tasks.create_task(volume.read(0, 1))
        await everything_else()
        fetching.cancel()
        await everything_else()
        assert not waiting.done()
        source.go.set()
    assert len(source.asked) == 2
    assert bytes(waiting.result()) == OLD[:1]


@interleaved
async def test_a_chunk_that_the_guest_is_covering_is_not_fetched():
    """A read of it waits for the write, and returns what was written."""
    source = DictSource({0: OLD})
    device = HeldDevice(CHUNK, slow="write", hold="write")
    _, volume = make_volume(device, ABSENT)
    volume.set_source(ABSENT, source)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW))
        write = await device.next("write")
        read = tasks.create_task(volume.read(0, CHUNK))
        await everything_else()
        write.release()
    assert bytes(read.result()) == NEW
    assert source.asked == []


@interleaved
async def test_a_large_read_hydrates_side_by_side_and_reports_an_error():
    """Several chunks are asked for at a time; the first error ends the read, and no task is left."""
    source = Slow({0: OLD, 1: None, 2: NEW})
    _, volume = make_volume(MemoryDevice(3 * CHUNK), ABSENT)
    volume.set_source(ABSENT, source)
    async with asyncio.TaskGroup() as tasks:
        read = tasks.create_task(volume.read(0, 3 * CHUNK))
        await everything_else()
        assert len(source.asked) == 3
        source.go.set()
    assert bytes(read.result()) == OLD + bytes(CHUNK) + NEW
    await volume.invalidate(0, 3, ABSENT)
    source.error = UnavailableError("gone")
    with pytest.raises(UnavailableError, match="gone"):
        await volume.read(0, 3 * CHUNK)


@interleaved
async def test_a_huge_prefetch_is_done_a_few_chunks_at_a_time():
    """However many chunks are asked for, a window of them is under way."""
    count = 5 * HYDRATE_WINDOW
    source = Slow(dict.fromkeys(range(count)))
    _, volume = make_volume(MemoryDevice(count * CHUNK), ABSENT)
    volume.set_source(ABSENT, source)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.prefetch(0, count * CHUNK))
        await everything_else()
        assert len(source.asked) == HYDRATE_WINDOW
        source.go.set()
    assert states(volume) == [UNPUNCHED] * count


@interleaved
async def test_prefetch_is_not_urgent():
    """It hydrates what the extent touches, in the background's lane."""
    source = Slow({0: OLD, 1: None, 2: NEW})
    source.go.set()
    _, volume = make_volume(MemoryDevice(3 * CHUNK), ABSENT)
    volume.set_source(ABSENT, source)
    await volume.prefetch(CHUNK - 1, 2)
    assert sorted(source.asked) == [(0, False), (1, False)]
    assert states(volume) == [PRESENT, UNPUNCHED, ABSENT]
    await volume.prefetch(0, 2 * CHUNK)
    assert len(source.asked) == 2


async def test_read_chunk_is_stable_and_not_held_back_by_the_gate():
    """The source of a migration goes on serving after the switchover; later writes do not change what it read."""
    device = HeldDevice(2 * CHUNK)
    group, volume = make_volume(device, ABSENT)
    volume.set_source(ABSENT, DictSource({0: OLD, 1: None}))
    await group.gate.close_and_drain()
    found = await volume.read_chunk(0)
    assert await volume.read_chunk(1) is None
    group.gate.reopen()
    assert volume.write_nowait(0, NEW)
    assert bytes(found) == OLD
    device.slow = {"read"}
    assert await volume.read_chunk(0) == NEW


# ---- invalidation ---------------------------------------------------------------------------------------


async def test_invalidation_makes_absent():
    """Whatever the chunks were; the next checkpoint says so too."""
    keeper = KeptMaps()
    _, volume = make_volume(MemoryDevice(4 * CHUNK), keeper=keeper)
    await volume.invalidate(1, 3, PEER)
    assert states(volume) == [PRESENT, PEER, PEER, PRESENT]
    await volume.flush()
    assert keeper.states == bytes([PRESENT, PEER, PEER, PRESENT])


async def test_what_cannot_be_invalidated():
    """To something that is not absent; and what a cut is reading."""
    group, volume = make_volume(MemoryDevice(CHUNK))
    with pytest.raises(InvariantError, match="ZERO"):
        await volume.invalidate(0, 1, ZERO)
    volume.write_nowait(0, NEW)
    cut = group.take()
    with pytest.raises(InvariantError, match="cut"):
        await volume.invalidate(0, 1, PEER)
    cut.abandon()
