"""Volumes of one group under everything at once, against the oracle, over many seeds.

Guests read, write, zero and flush, overlapping one another and sometimes giving up; chunks are absent and hydrated
from a source that is slow and fails; cuts are taken, read, committed and abandoned, with little room for copies; a
migration copies rounds of dirty chunks and closes the gate for the last one. Devices take their time and decline
the fast path as they like.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest

from silo.abc import Buffer, ChunkSource
from silo.chunkmap import ChunkMap, Residency
from silo.devices.delayed import DelayedDevice, Delays
from silo.devices.memory import MemoryDevice
from silo.errors import CapacityError, UnavailableError
from silo.geometry import CHUNK_SIZE_MIN, Geometry
from silo.group import CopyLimits, Group
from silo.testing.loop import SimulatedClock, explore
from silo.volume import Volume
from tests.sim.oracle import BLOCK, Oracle, stamped
from tests.support.seeds import seeds

CHUNK = CHUNK_SIZE_MIN
CHUNKS = 6
SIZE = CHUNK * CHUNKS - 3 * BLOCK  # the last chunk is short
DELAYS = Delays(read_s=0.01, write_s=0.01, flush_s=0.02, jitter=1.0, decline=0.5)
NAMES = ("disk", "memory")


class SlowSource(ChunkSource):
    """The initial content, after a while, if at all."""

    def __init__(self, images: dict[str, bytes], chance: random.Random) -> None:
        self.images = images
        self.chance = chance

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        await asyncio.sleep(self.chance.uniform(0, 0.03))
        if self.chance.random() < 0.1:
            raise UnavailableError("the source is away")
        content = self.images[volume][chunk * CHUNK : (chunk + 1) * CHUNK]
        return content if any(content) else None


class World:
    """A group of two volumes, most of whose chunks are absent, the oracle, and the last committed image."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.chance = clock.random
        self.group = Group(
            "vm", clock, copies=CopyLimits(memory=self.chance.choice((1, 4, 16)) * CHUNK, spill=0)
        )
        self.oracles: dict[str, Oracle] = {}
        self.committed: dict[str, bytearray] = {}
        self.stamp = 0
        self.acknowledged = self.commits = 0
        images: dict[str, bytes] = {}
        for name in NAMES:
            stamps = [self.next_stamp() if self.chance.random() < 0.7 else 0 for _ in range(SIZE // BLOCK)]
            images[name] = b"".join(stamped(stamp, 1) for stamp in stamps)
            self.oracles[name] = Oracle(name, stamps)
            self.committed[name] = bytearray(images[name])
            self.add_volume(name, images[name])
        for volume in self.group.volumes.values():
            volume.set_source(Residency.ABSENT_STORE, SlowSource(images, self.chance))

    def add_volume(self, name: str, image: bytes) -> None:
        """A volume some of whose chunks are on the device from the start."""
        device = MemoryDevice(SIZE)
        chunks = ChunkMap.filled(CHUNKS, Residency.ABSENT_STORE)
        for chunk in range(CHUNKS):
            if self.chance.random() < 0.4:
                device.write_nowait(chunk * CHUNK, image[chunk * CHUNK : (chunk + 1) * CHUNK])
                chunks.set_residency(chunk, Residency.PRESENT)
        slow = DelayedDevice(device, DELAYS, self.chance.random)
        self.group.add(name, slow, Geometry(SIZE, chunk_size=CHUNK), chunks=chunks)

    def next_stamp(self) -> int:
        self.stamp += 1
        return self.stamp

    def any_volume(self) -> tuple[Volume, Oracle]:
        name = self.chance.choice(NAMES)
        return self.group.volumes[name], self.oracles[name]

    def any_extent(self) -> tuple[int, int]:
        """Blocks ``(first, limit)``: often one, often a whole chunk, sometimes across chunks."""
        blocks = SIZE // BLOCK
        if self.chance.random() < 0.3:
            chunk = self.chance.randrange(CHUNKS) * (CHUNK // BLOCK)
            return chunk, min(blocks, chunk + CHUNK // BLOCK)
        first = self.chance.randrange(blocks)
        return first, min(blocks, first + self.chance.choice((1, 3, 8, 20)))


async def guest(world: World, requests: int) -> None:
    """One request after the other; some are given up."""
    kinds: tuple[Callable[[World], Awaitable[None]], ...] = (
        guest_write,
        guest_write,
        guest_zero,
        guest_read,
        guest_flush,
    )
    for _ in range(requests):
        patience_s = world.chance.uniform(0, 0.05) if world.chance.random() < 0.2 else 60
        with contextlib.suppress(TimeoutError, UnavailableError):
            async with asyncio.timeout(patience_s):
                await world.chance.choice(kinds)(world)
        await asyncio.sleep(world.chance.choice((0, 0.005)))


async def guest_write(world: World) -> None:
    volume, oracle = world.any_volume()
    first, limit = world.any_extent()
    request = oracle.begin(first, limit, world.next_stamp())
    acknowledged = False
    try:
        await volume.write(first * BLOCK, stamped(request.stamp, limit - first))
        acknowledged = True
        world.acknowledged += 1
    finally:
        oracle.end(request, acknowledged=acknowledged)


async def guest_zero(world: World) -> None:
    volume, oracle = world.any_volume()
    first, limit = world.any_extent()
    request = oracle.begin(first, limit, 0)
    acknowledged = False
    try:
        extent = first * BLOCK, (limit - first) * BLOCK
        if not volume.zero_nowait(*extent):
            await volume.zero(*extent)
        acknowledged = True
    finally:
        oracle.end(request, acknowledged=acknowledged)


async def guest_read(world: World) -> None:
    volume, oracle = world.any_volume()
    first, limit = world.any_extent()
    reading = oracle.begin_read(first, limit)
    content: bytes | None = None
    try:
        content = bytes(await volume.read(first * BLOCK, (limit - first) * BLOCK))
    finally:
        oracle.end_read(reading, content)


async def guest_flush(world: World) -> None:
    volume, _ = world.any_volume()
    await volume.flush()


async def syncer(world: World, cuts: int) -> None:
    """Take cuts, read them in any order, and decide them; a committed image was possible at its instant."""
    for _ in range(cuts):
        await asyncio.sleep(world.chance.uniform(0, 0.1))
        cut = world.group.take()
        allowed = {name: oracle.now() for name, oracle in world.oracles.items()}
        image = {name: bytearray(content) for name, content in world.committed.items()}
        for name, part in cut.volumes.items():
            for first, limit in part.zeros:
                extent = slice(first * CHUNK, min(limit * CHUNK, SIZE))
                image[name][extent] = bytes(len(image[name][extent]))
            chunks = part.data.tolist()
            world.chance.shuffle(chunks)
            for chunk in chunks:
                await asyncio.sleep(world.chance.choice((0, 0.01)))
                try:
                    image[name][chunk * CHUNK : (chunk + 1) * CHUNK] = await part.read(chunk)
                except CapacityError:
                    break
                if world.chance.random() < 0.5:
                    part.release(chunk)
        if cut.overflowed or world.chance.random() < 0.2:
            cut.abandon()
            continue
        cut.commit()
        world.commits += 1
        world.committed = image
        for name, oracle in world.oracles.items():
            oracle.check(image[name], allowed[name], 0, "a commit")


async def migration(world: World, rounds: int) -> None:
    """Copy everything, then what was written meanwhile, then the rest behind a closed gate: nothing is missing."""
    await asyncio.sleep(world.chance.uniform(0, 0.1))
    world.group.record_migration(True)
    copies = {name: bytearray(SIZE) for name in NAMES}
    todo = {name: list(range(CHUNKS)) for name in NAMES}
    for _ in range(rounds):
        await copy_chunks(world, todo, copies)
        todo = {name: chunks.tolist() for name, chunks in world.group.take_migration().items()}
    await world.group.gate.close_and_drain()
    for name, chunks in world.group.take_migration().items():
        todo[name] += chunks.tolist()
    await copy_chunks(world, todo, copies)
    for name, oracle in world.oracles.items():
        oracle.check(copies[name], oracle.now(), 0, "a migration")
    world.group.record_migration(False)
    world.group.gate.reopen()


async def copy_chunks(world: World, todo: dict[str, list[int]], copies: dict[str, bytearray]) -> None:
    for name, chunks in todo.items():
        for chunk in chunks:
            content = await read_patiently(world.group.volumes[name], chunk)
            extent = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, SIZE))
            copies[name][extent] = bytes(extent.stop - extent.start) if content is None else content


async def read_patiently(volume: Volume, chunk: int) -> Buffer | None:
    """Read a chunk, again when the source was away."""
    while True:
        try:
            return await volume.read_chunk(chunk)
        except UnavailableError:
            await asyncio.sleep(0.01)


async def everything_at_once(clock: SimulatedClock) -> World:
    """The scenario; ends with a look at every block."""
    world = World(clock)
    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(guest(world, 20), name=f"guest-{number}")
        tasks.create_task(syncer(world, 8), name="syncer")
        tasks.create_task(migration(world, 2), name="migration")
    for name, volume in world.group.volumes.items():
        parts = [await read_patiently(volume, chunk) for chunk in range(CHUNKS)]
        lengths = [volume.geometry.extent_of(chunk)[1] for chunk in range(CHUNKS)]
        content = b"".join(part or bytes(length) for part, length in zip(parts, lengths, strict=True))
        oracle = world.oracles[name]
        oracle.check(content, oracle.now(), 0, "the end")
    return world


@pytest.mark.sim
def test_everything_at_once():
    """No read is stale, every commit is one instant of both volumes, and a migration misses nothing."""
    worlds = explore(everything_at_once, seeds=seeds(150))
    assert all(world.acknowledged for world in worlds)
    assert sum(world.commits for world in worlds) > len(worlds)
