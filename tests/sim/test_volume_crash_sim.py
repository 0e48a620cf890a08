"""A process dies, or its machine, while guests and the syncer are at work: what comes back?

After the death of the process the page cache and the mapped states are there: every block holds a value that was
possible at that moment. After the death of the machine only the last checkpoint and what the disk had written back:
a value not older than the last flush that had ended. In both cases what was read once is read again, and the
last commit together with the next cut is the whole content.
"""

from __future__ import annotations

import asyncio

import pytest

from silo.checkpoint import kept_of, states_after_power_loss
from silo.chunkmap import ChunkMap, after_restart
from silo.testing.loop import SimulatedClock, explore
from silo.testing.process import SimulatedProcess
from tests.sim.oracle import BLOCK, Oracle, stamps_of
from tests.sim.volume_world import CHUNKS, NAMES, World, guest, one_cut, read_all, syncer
from tests.support.seeds import seeds


async def at_work(world: World) -> None:
    """What the process does until it dies."""
    world.start()
    async with asyncio.TaskGroup() as tasks:
        for number in range(3):
            tasks.create_task(guest(world, 1000), name=f"guest-{number}")
        tasks.create_task(syncer(world, 1000), name="syncer")


async def crash(clock: SimulatedClock, *, power: bool) -> World:
    """The scenario. It dies twice, because what was left half done may only show the second time."""
    world = await World.make(clock)
    for _ in range(2):
        async with SimulatedProcess(at_work(world), kill_after=clock.random.randrange(800)) as process:
            await process.wait_ended()
        allowed = {name: o.durable() if power else o.now() for name, o in world.oracles.items()}
        for name in NAMES:
            if power:
                world.disks[name] = await world.disks[name].power_loss(clock.random.random)
                states = states_after_power_loss(kept_of(world.keepers[name].states or b""))
                world.states[name] = bytearray(states.tobytes())
            else:
                after_restart(ChunkMap(world.states[name], CHUNKS).view)
        world.start()
        for name, oracle in world.oracles.items():
            content = await read_all(world, name)
            oracle.check(content, allowed[name], 0, "the restart")
            # From here on it holds exactly this, and no more surprises.
            world.oracles[name] = Oracle(name, stamps_of(content))
    world.limits = world.limits.__class__(memory=1 << 20, spill=0)
    world.start()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(guest(world, 10))
    before = world.commits
    while world.commits == before:
        await one_cut(world)
    for name, oracle in world.oracles.items():
        oracle.check(await read_all(world, name), oracle.now(), 0, "the end")
        oracle.check(world.committed[name], oracle.now(), 0, "the last commit")
        assert len(world.committed[name]) % BLOCK == 0
    return world


@pytest.mark.sim
@pytest.mark.parametrize("power", [False, True], ids=["process", "power"])
def test_what_comes_back(power):
    """Nothing that was promised is missing, and nothing changes afterwards."""

    async def scenario(clock: SimulatedClock) -> World:
        return await crash(clock, power=power)

    worlds = explore(scenario, seeds=seeds(60))
    assert sum(world.flushed for world in worlds) > len(worlds)
    assert sum(world.commits for world in worlds) > len(worlds)
