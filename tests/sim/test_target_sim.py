"""The target of a migration before and after the switchover: nothing that arrives late may be used.

Before the claim the source goes on changing. What it changed it invalidates, with or without a newer generation in
the store, and pushes again; meanwhile the target pulls cold chunks from the store in the background and is asked
for some of them again and again. After the claim the guest runs while the rest is absent. It must find, in every
block, what the source had in the end.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from silo.abc import Buffer, ChunkSource
from silo.chunkmap import ChunkMap, Residency
from silo.devices.delayed import DelayedDevice
from silo.devices.memory import MemoryDevice
from silo.errors import UnavailableError
from silo.group import Group
from silo.testing.loop import SimulatedClock, explore
from tests.sim.oracle import BLOCK, Oracle, stamped, stamps_of
from tests.sim.volume_world import CHUNK, CHUNKS, DELAYS, GEOMETRY, SIZE
from tests.support.piecemeal import PiecemealDevice
from tests.support.seeds import seeds

PULLS = 40
CHANGES = 25


class Image(ChunkSource):
    """The store, or the source: it answers late with what it had when it was asked."""

    def __init__(self, content: bytes, clock: SimulatedClock) -> None:
        self.content = bytearray(content)
        self.chance = clock.random

    def chunk(self, chunk: int) -> bytes:
        offset, length = GEOMETRY.extent_of(chunk)
        return bytes(self.content[offset : offset + length])

    def put(self, chunk: int, content: bytes) -> None:
        self.content[chunk * CHUNK : chunk * CHUNK + len(content)] = content

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer | None:
        content = self.chunk(chunk)
        await asyncio.sleep(self.chance.uniform(0, 0.05))
        if self.chance.random() < 0.1:
            raise UnavailableError("the link broke")
        return content if any(content) else None


class Target:
    """The target's volume, and the two places that its chunks come from."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.chance = clock.random
        self.stamp = SIZE // BLOCK
        content = b"".join(stamped(stamp, 1) for stamp in range(1, self.stamp + 1))
        self.source, self.store = Image(content, clock), Image(content, clock)
        self.group = Group("vm", clock, is_open=False)
        device = PiecemealDevice(DelayedDevice(MemoryDevice(SIZE), DELAYS, self.chance.random), 3 * BLOCK)
        chunks = ChunkMap.filled(CHUNKS, Residency.ABSENT_STORE)
        self.volume = self.group.add("disk", device, GEOMETRY, chunks=chunks)
        self.volume.set_source(Residency.ABSENT_STORE, self.store)
        self.volume.set_source(Residency.ABSENT_PEER, self.source)
        self.claimed = False

    async def pull(self) -> None:
        """The background: chunks that the store has, also such as are present already."""
        for _ in range(PULLS):
            chunk = self.chance.randrange(CHUNKS)
            if self.volume.chunks.residency(chunk) is not Residency.ABSENT_PEER or self.claimed:
                with contextlib.suppress(UnavailableError, TimeoutError):
                    async with asyncio.timeout(self.chance.choice((0.01, 60))):
                        await self.volume.hydrate(chunk)
            await asyncio.sleep(self.chance.choice((0, 0.01)))

    async def receive(self) -> None:
        """What the source sends, in its order: invalidations, and pushes of what it has at that moment."""
        for _ in range(CHANGES):
            chunk = self.chance.randrange(CHUNKS)
            if self.chance.random() < 0.7:
                await self.change(chunk)
            if self.chance.random() < 0.6 and self.volume.chunks.residency(chunk) is Residency.ABSENT_PEER:
                await self.volume.fill(chunk, self.source.chunk(chunk))
            await asyncio.sleep(self.chance.choice((0, 0.01)))
        self.claimed = True

    async def change(self, chunk: int) -> None:
        """The guest at the source writes; perhaps the source stores it before it says so."""
        self.stamp += 1
        _, length = GEOMETRY.extent_of(chunk)
        self.source.put(chunk, stamped(self.stamp, length // BLOCK))
        if self.chance.random() < 0.4:
            self.store.put(chunk, self.source.chunk(chunk))
            await self.volume.invalidate(chunk, chunk + 1, Residency.ABSENT_STORE)
        else:
            await self.volume.invalidate(chunk, chunk + 1, Residency.ABSENT_PEER)

    async def run_guest(self, oracle: Oracle) -> None:
        """After the switchover: reads anywhere, and writes."""
        for _ in range(20):
            first = self.chance.randrange(SIZE // BLOCK)
            limit = min(SIZE // BLOCK, first + self.chance.choice((1, 8, 20)))
            with contextlib.suppress(UnavailableError):
                if self.chance.random() < 0.6:
                    reading = oracle.begin_read(first, limit)
                    found = None
                    try:
                        found = await self.volume.read(first * BLOCK, (limit - first) * BLOCK)
                    finally:
                        oracle.end_read(reading, found)
                else:
                    self.stamp += 1
                    request = oracle.begin(first, limit, self.stamp)
                    acknowledged = False
                    try:
                        await self.volume.write(first * BLOCK, stamped(self.stamp, limit - first))
                        acknowledged = True
                    finally:
                        oracle.end(request, acknowledged=acknowledged)


async def switchover(clock: SimulatedClock) -> Target:
    """The scenario."""
    target = Target(clock)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(2):
            tasks.create_task(target.pull())
        await target.receive()
        oracle = Oracle("disk", stamps_of(target.source.content))
        target.group.gate.reopen()
        for _ in range(3):
            tasks.create_task(target.run_guest(oracle))
    while True:
        with contextlib.suppress(UnavailableError):
            found = await target.volume.read(0, SIZE)
            break
    oracle.check(found, oracle.now(), 0, "the end")
    return target


@pytest.mark.sim
def test_the_target_has_what_the_source_had():
    """However pulls, pushes and invalidations cross."""
    targets = explore(switchover, seeds=seeds(100))
    assert all(target.volume.filled_bytes for target in targets)
