"""A small group with everything around it that makes life hard, and guests that use it.

Shared by the simulations of volumes: they differ in what they do beside the guests, and in how it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Self

from silo.abc import BlockDevice, Buffer, ChunkSource
from silo.chunkmap import ChunkMap, Residency
from silo.devices.delayed import DelayedDevice, Delays
from silo.devices.faulty import FaultyDevice
from silo.devices.volatile import VolatileDevice
from silo.errors import CapacityError, UnavailableError
from silo.geometry import CHUNK_SIZE_MIN, Geometry
from silo.group import CopyLimits, Group
from silo.testing.loop import SimulatedClock
from silo.volume import Volume
from tests.sim.oracle import BLOCK, Oracle, stamped
from tests.support.piecemeal import PiecemealDevice
from tests.support.volumes import KeptMaps

CHUNK = CHUNK_SIZE_MIN
CHUNKS = 6
SIZE = CHUNK * CHUNKS - 3 * BLOCK  # the last chunk is short
GEOMETRY = Geometry(SIZE, chunk_size=CHUNK)
DELAYS = Delays(read_s=0.01, write_s=0.01, flush_s=0.02, jitter=1.0, decline=0.5)
NAMES = ("disk", "memory")


class SlowSource(ChunkSource):
    """The content of an image when it was asked, after a while, if at all."""

    def __init__(self, images: dict[str, bytearray], chance: random.Random) -> None:
        self.images = images
        self.chance = chance

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        content = bytes(self.images[volume][chunk * CHUNK : (chunk + 1) * CHUNK])
        await asyncio.sleep(self.chance.uniform(0, 0.03))
        if self.chance.random() < 0.1:
            raise UnavailableError("the source is away")
        return content if any(content) else None


class SlowMaps(KeptMaps):
    """A keeper whose checkpoints take their time; the old one counts until then."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance

    async def checkpoint(self, states: bytes) -> None:
        await asyncio.sleep(self.chance.uniform(0, 0.02))
        await super().checkpoint(states)


class World:
    """A group of two volumes, most of whose chunks are absent, the oracle, and the last committed images.

    ``disks``, ``states`` and ``keepers`` are what outlives the process; `start` makes the rest, also again.
    """

    def __init__(self, clock: SimulatedClock) -> None:
        self.clock = clock
        self.chance = clock.random
        self.limits = CopyLimits(memory=self.chance.choice((1, 4, 16)) * CHUNK, spill=0)
        self.disks: dict[str, VolatileDevice] = {}
        self.states: dict[str, bytearray] = {}
        self.keepers: dict[str, SlowMaps] = {}
        self.oracles: dict[str, Oracle] = {}
        self.committed: dict[str, bytearray] = {}
        self.faulty: dict[str, FaultyDevice] = {}
        self.stamp = 0
        self.acknowledged = self.flushed = self.commits = 0
        for name in NAMES:
            stamps = [self.next_stamp() if self.chance.random() < 0.7 else 0 for _ in range(SIZE // BLOCK)]
            self.oracles[name] = Oracle(name, stamps)
            self.committed[name] = bytearray(b"".join(stamped(stamp, 1) for stamp in stamps))
            self.disks[name] = disk = VolatileDevice(SIZE)
            self.keepers[name] = SlowMaps(self.chance)
            self.states[name] = states = bytearray(CHUNKS)
            for chunk in range(CHUNKS):
                if self.chance.random() < 0.4:
                    offset, length = GEOMETRY.extent_of(chunk)
                    content = self.committed[name][offset : offset + length]
                    disk.write_nowait(offset, content)
                    states[chunk] = Residency.PRESENT if any(content) else Residency.ZERO
            self.keepers[name].states = bytes(states)

    @classmethod
    async def make(cls, clock: SimulatedClock) -> Self:
        """A world whose disks hold their initial content for good."""
        world = cls(clock)
        for disk in world.disks.values():
            await disk.flush()
        return world

    def start(self) -> Group:
        """What a process does when it starts."""
        self.group = Group("vm", self.clock, copies=self.limits)
        source = SlowSource(self.committed, self.chance)
        for name, states in self.states.items():
            device: BlockDevice = DelayedDevice(self.disks[name], DELAYS, self.chance.random)
            self.faulty[name] = FaultyDevice(PiecemealDevice(device, 3 * BLOCK))
            volume = self.group.add(
                name, self.faulty[name], GEOMETRY, chunks=ChunkMap(states, CHUNKS), keeper=self.keepers[name]
            )
            volume.set_source(Residency.ABSENT_STORE, source)
        return self.group

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
    """One request after the other; some are given up, and some fail."""
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
        content = stamped(request.stamp, limit - first)
        if not volume.write_nowait(first * BLOCK, content):
            await volume.write(first * BLOCK, content)
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
        extent = first * BLOCK, (limit - first) * BLOCK
        found = volume.read_nowait(*extent)
        content = bytes(await volume.read(*extent) if found is None else found)
    finally:
        oracle.end_read(reading, content)


async def guest_flush(world: World) -> None:
    volume, oracle = world.any_volume()
    flush = oracle.begin_flush()
    await volume.flush()
    oracle.end_flush(flush)
    world.flushed += 1


async def syncer(world: World, cuts: int) -> None:
    """Take cuts, read them in any order, and decide them; a committed image was possible at its instant."""
    for _ in range(cuts):
        await asyncio.sleep(world.chance.uniform(0, 0.1))
        await one_cut(world)


async def one_cut(world: World) -> None:
    """Take a cut, upload it with two uploaders, and commit it, if nothing is in the way."""
    cut = world.group.take()
    allowed = {name: oracle.now() for name, oracle in world.oracles.items()}
    image = {name: bytearray(content) for name, content in world.committed.items()}
    todo: list[tuple[str, int]] = []
    for name, part in cut.volumes.items():
        for first, limit in part.zeros:
            extent = slice(first * CHUNK, min(limit * CHUNK, SIZE))
            image[name][extent] = bytes(len(image[name][extent]))
        todo += [(name, chunk) for chunk in part.data.tolist()]
    world.chance.shuffle(todo)

    async def upload() -> None:
        while todo:
            name, chunk = todo.pop()
            await asyncio.sleep(world.chance.choice((0, 0.01)))
            part = cut.volumes[name]
            image[name][chunk * CHUNK : (chunk + 1) * CHUNK] = await part.read(chunk)
            if world.chance.random() < 0.5:
                part.release(chunk)

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(upload())
            tasks.create_task(upload())
    except* CapacityError:
        assert cut.overflowed
    except* UnavailableError:
        todo.append(("disk", -1))  # not all of it was read
    if todo or cut.overflowed or world.chance.random() < 0.2:
        cut.abandon()
        return
    for name, oracle in world.oracles.items():
        oracle.check(image[name], allowed[name], 0, "a commit")
        world.committed[name][:] = image[name]
        part = cut.volumes[name]
        for chunk in part.data.tolist():
            part.release(chunk)  # or room could run out while the store is asked to commit
    await asyncio.sleep(world.chance.choice((0, 0.01)))  # the store has it, and nobody here knows yet
    cut.commit()
    world.commits += 1


async def read_patiently(volume: Volume, chunk: int) -> Buffer | None:
    """Read a chunk, again when the source was away or the device failed."""
    while True:
        try:
            return await volume.read_chunk(chunk)
        except UnavailableError:
            await asyncio.sleep(0.01)


async def read_all(world: World, name: str) -> bytes:
    """The whole content of a volume."""
    volume = world.group.volumes[name]
    parts = [await read_patiently(volume, chunk) for chunk in range(CHUNKS)]
    lengths = [GEOMETRY.extent_of(chunk)[1] for chunk in range(CHUNKS)]
    return b"".join(part or bytes(length) for part, length in zip(parts, lengths, strict=True))
