"""Processes die and machines lose power over an overlay: what comes back?

On the deterministic loop guests write, zero, read and flush an overlay whose data starts full of rubbish, over a base
and partly beyond its end; calls take their time, are seen half done, fail, and are given up. After the death of the
process every block holds what was possible at that moment; after that of the machine, nothing older than the last
flush that had ended. Then real processes are killed with signal 9 in the middle of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from silo.chunklocks import ChunkLocks
from silo.devices.delayed import DelayedDevice, Delays
from silo.devices.faulty import FaultyDevice
from silo.devices.overlay import OverlayDevice
from silo.devices.overlay_folder import fresh_cells
from silo.devices.overlay_open import open_overlay
from silo.devices.volatile import VolatileDevice
from silo.geometry import Geometry
from silo.testing.loop import SimulatedClock, explore
from silo.testing.process import SimulatedProcess
from tests.crash.child import BLOCK as CHILD_BLOCK
from tests.crash.child import BLOCKS as CHILD_BLOCKS
from tests.crash.child import block_of, image
from tests.crash.test_kill import ROUNDS, run_and_kill
from tests.sim.oracle import BLOCK, Oracle, stamped, stamps_of
from tests.sim.volume_world import guest
from tests.support.overlays import CELL, KeptMap, memory_with
from tests.support.piecemeal import PiecemealDevice
from tests.support.seeds import seeds

pytestmark = pytest.mark.crash

CELLS = 6
SIZE = CELLS * CELL - 3 * BLOCK  # the last cell is short
BLOCKS = SIZE // BLOCK
BASE_BLOCKS = BLOCKS - CELL // BLOCK - 2  # its last cell has no base, the one before in part
RUBBISH = 1 << 40
DELAYS = Delays(read_s=0.01, write_s=0.01, flush_s=0.02, jitter=1.0, decline=0.5)


class World:
    """One overlay with everything around it that makes life hard. `start` makes what a process makes."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.chance = clock.random
        self.stamp = self.acknowledged = self.flushed = 0
        stamps = [self.next_stamp() if self.chance.random() < 0.7 else 0 for _ in range(BASE_BLOCKS)]
        self.base = memory_with(b"".join(stamped(stamp, 1) for stamp in stamps))
        self.disk = VolatileDevice(SIZE)
        self.kept = KeptMap(fresh_cells(Geometry(SIZE, CELL), self.base.size), self.chance)
        self.oracle = Oracle("overlay", stamps + [0] * (BLOCKS - BASE_BLOCKS))

    def start(self) -> None:
        base = FaultyDevice(DelayedDevice(self.base, DELAYS, self.chance.random))
        data = PiecemealDevice(DelayedDevice(self.disk, DELAYS, self.chance.random), 3 * BLOCK)
        self.faulty = (base, FaultyDevice(data))
        self.overlay = OverlayDevice(*self.faulty, Geometry(SIZE, CELL), self.kept)

    def next_stamp(self) -> int:
        self.stamp += 1
        return self.stamp

    def any_volume(self) -> tuple[OverlayDevice, Oracle]:
        return self.overlay, self.oracle

    def any_extent(self) -> tuple[int, int]:
        """Blocks ``(first, limit)``: often one, often a whole cell, sometimes across cells."""
        if self.chance.random() < 0.3:
            first = self.chance.randrange(CELLS) * (CELL // BLOCK)
            return first, min(BLOCKS, first + CELL // BLOCK)
        first = self.chance.randrange(BLOCKS)
        return first, min(BLOCKS, first + self.chance.choice((1, 3, 8, 20)))


async def trouble(world: World) -> None:
    """Now and then a call fails, perhaps half done."""
    while True:
        await asyncio.sleep(world.chance.uniform(0, 0.3))
        torn = world.chance.randrange(0, 2 * CELL, BLOCK)
        world.chance.choice(world.faulty).fail(nth=world.chance.randrange(1, 4), torn=torn)


async def at_work(world: World, requests: int = 1000) -> None:
    """What a process does until it dies, or has done enough."""
    world.start()
    async with asyncio.TaskGroup() as tasks:
        trouble_maker = tasks.create_task(trouble(world))
        async with asyncio.TaskGroup() as guests:
            for number in range(4):
                guests.create_task(guest(world, requests), name=f"guest-{number}")
        trouble_maker.cancel()


async def lives(clock: SimulatedClock, *, power: bool) -> World:
    """It dies three times, because what was left half done may only show later, and works on to a good end."""
    world = World(clock)
    world.disk.write_nowait(0, stamped(RUBBISH, BLOCKS))
    await world.disk.flush()
    for _ in range(3):
        async with SimulatedProcess(at_work(world), kill_after=clock.random.randrange(600)) as process:
            await process.wait_ended()
        allowed = world.oracle.durable() if power else world.oracle.now()
        if power:
            world.disk = await world.disk.power_loss(clock.random.random)
        world.kept = world.kept.restart(power=power)
        world.start()
        content = await world.overlay.read(0, SIZE)
        world.oracle.check(content, allowed, 0, "the restart")
        # From here on it holds exactly this, and no more surprises.
        world.oracle = Oracle("overlay", stamps_of(content))
    await at_work(world, 20)
    for device in world.faulty:
        device.heal()
    world.oracle.check(await world.overlay.read(0, SIZE), world.oracle.now(), 0, "the end")
    return world


def explore_lives(*, power: bool, count: int) -> list[World]:
    async def scenario(clock: SimulatedClock) -> World:
        return await lives(clock, power=power)

    return explore(scenario, seeds=seeds(count))


@pytest.mark.sim
@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
def test_what_comes_back(power: bool) -> None:
    """Nothing that was promised is missing, and neither the rubbish nor what was replaced ever shows."""
    worlds = explore_lives(power=power, count=60)
    assert sum(world.flushed for world in worlds) > len(worlds)
    assert sum(world.acknowledged for world in worlds) > 20 * len(worlds)


async def forgetful(self: KeptMap, states: bytes) -> None:
    """A checkpoint that is not written."""


async def lies(self: VolatileDevice) -> None:
    """A flush that leaves everything in the cache."""


async def hasty(self: OverlayDevice) -> None:
    """The map is copied a while after the data was flushed, and not before."""
    await self._data.flush()
    await asyncio.sleep(0.05)
    await self._state.checkpoint(bytes(self._states))


@contextlib.contextmanager
def unlocked(self: ChunkLocks, first: int, limit: int) -> Iterator[None]:
    """Nobody is kept out."""
    yield


def narrow(self: OverlayDevice, first: int, limit: int, start: int, stop: int) -> tuple[int, int]:
    """Nothing is copied up."""
    return start, stop


@pytest.mark.sim
@pytest.mark.parametrize(
    ("target", "sabotage", "power"),
    [
        ("tests.support.overlays.KeptMap.checkpoint", forgetful, True),
        ("silo.devices.volatile.VolatileDevice.flush", lies, True),
        ("silo.devices.overlay.OverlayDevice.flush", hasty, True),
        ("silo.chunklocks.ChunkLocks.writing", unlocked, False),
        ("silo.devices.overlay.OverlayDevice._widened", narrow, False),
    ],
)
def test_the_test_would_notice(
    target: str, sabotage: object, power: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of a flush is needed, and so are the locks and the copying."""
    monkeypatch.setattr(target, sabotage)
    with pytest.raises((AssertionError, BaseExceptionGroup)) as caught:
        explore_lives(power=power, count=300)
    assert "saw" in str(first_of(caught.value))


def first_of(error: BaseException) -> BaseException:
    """The error itself, or the first in a group of groups."""
    return first_of(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


# ---- real processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "boot"), [("overlay", None), ("flushed-overlay", "another boot")])
async def test_killed_processes_leave_what_they_acknowledged(
    tmp_path: Path, what: str, boot: str | None
) -> None:
    """As it was written, where only the process died; as it was flushed, when only checkpoints are believed."""
    draw = random.Random(5)
    for round_number in range(ROUNDS):
        path = tmp_path / str(round_number)
        path.mkdir()
        (path / "golden.img").write_bytes(image())
        acknowledged = run_and_kill(what, path, draw.randrange(1, 150))
        expected = [image()[block * CHILD_BLOCK :][:CHILD_BLOCK] for block in range(CHILD_BLOCKS)]
        for step in range(1, acknowledged + 1):
            block, content = block_of(step)
            expected[block] = content
        begun, attempted = block_of(acknowledged + 1)
        async with contextlib.aclosing(
            await open_overlay(path / "disk.overlay", path / "golden.img", boot=boot)
        ) as device:
            for block in range(CHILD_BLOCKS):
                found = bytes(await device.read(block * CHILD_BLOCK, CHILD_BLOCK))
                assert found == expected[block] or (block == begun and found == attempted)
        assert (path / "golden.img").read_bytes() == image()
