"""Volumes of one group under everything at once, against the oracle, over many seeds.

Guests read, write, zero and flush, overlapping one another and sometimes giving up; chunks are absent and hydrated
from a source that is slow and fails; cuts are taken, read, committed and abandoned, with little room for copies; a
migration copies rounds of dirty chunks and closes the gate for the last one. Devices take their time, decline the
fast path as they like, do large requests piece by piece, and fail in the middle of them.
"""

from __future__ import annotations

import asyncio

import pytest

from silo.testing.loop import SimulatedClock, explore
from tests.sim.oracle import BLOCK
from tests.sim.volume_world import (
    CHUNK,
    CHUNKS,
    NAMES,
    SIZE,
    World,
    guest,
    read_all,
    read_patiently,
    syncer,
)
from tests.support.seeds import seeds


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


async def faults(world: World, count: int) -> None:
    """Device calls fail, writes and zeroing in the middle."""
    for _ in range(count):
        await asyncio.sleep(world.chance.uniform(0, 0.1))
        device = world.faulty[world.chance.choice(NAMES)]
        device.fail(nth=world.chance.randrange(1, 5), torn=world.chance.randrange(9) * BLOCK)
    for device in world.faulty.values():
        device.heal()


async def everything_at_once(clock: SimulatedClock) -> World:
    """The scenario; ends with a look at every block."""
    world = await World.make(clock)
    world.start()
    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(guest(world, 20), name=f"guest-{number}")
        tasks.create_task(syncer(world, 8), name="syncer")
        tasks.create_task(migration(world, 2), name="migration")
        tasks.create_task(faults(world, world.chance.choice((0, 8))), name="faults")
    for device in world.faulty.values():
        device.heal()
    for name, oracle in world.oracles.items():
        oracle.check(await read_all(world, name), oracle.now(), 0, "the end")
    return world


@pytest.mark.sim
def test_everything_at_once():
    """No read is stale, every commit is one instant of both volumes, and a migration misses nothing."""
    worlds = explore(everything_at_once, seeds=seeds(120))
    assert all(world.acknowledged for world in worlds)
    assert sum(world.commits for world in worlds) > len(worlds)
