"""Zeroing a whole disk of 2 TiB: what it costs, and what it does to everybody else.

Nothing here is measured in seconds: steps are counted in turns of the loop, and work is compared with one plain pass
over the same map, taken in the same moment on the same machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
import pytest

from silo.chunkmap import DIRTY_BITS, FROZEN, RESIDENCY_MASK, SYNC_DIRTY, ChunkMap, Residency
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.geometry import Geometry
from silo.group import Group
from silo.volume import ZERO_STEP, Volume

SIZE = 2 << 40
GEOMETRY = Geometry(SIZE)
COUNT = GEOMETRY.chunk_count
STEPS = COUNT // ZERO_STEP
REPEATS = 5
PASSES_MAX = 50
"""Measured: 6 for zeroing a disk in one state, 21 when every chunk differs from the next, 14 for the cut after it. One
window of the map at a time these would be 75 and 700."""


def huge(state: int) -> tuple[Group, Volume]:
    """A volume of 2 TiB, all of its chunks in one state, on a device that takes no memory until it is written."""
    group = Group("vm", SystemClock())
    chunks = ChunkMap(bytearray([state]) * COUNT, COUNT)
    return group, group.add("disk", MemoryDevice(SIZE), GEOMETRY, chunks=chunks)


def fastest(*calls: Callable[[], object]) -> list[float]:
    """The least time of each call; they take turns, so that a busy machine is busy for all of them."""
    best = [float("inf")] * len(calls)
    for _ in range(REPEATS):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def plain_pass(chunks: ChunkMap) -> None:
    """What touching every state of a map costs at least, done as the map itself does it: stretch by stretch."""
    for first in range(0, COUNT, ZERO_STEP):
        states = chunks.view[first : first + ZERO_STEP]
        np.bitwise_xor(states, np.uint8(0), out=states)


@pytest.mark.parametrize("in_cut", [False, True])
async def test_everybody_gets_a_turn_between_bounded_steps(in_cut: bool):
    """So that no request waits for more than one step; the disk reads as zeros at the end, in the cut it does not."""
    group, volume = huge(Residency.PRESENT)
    volume.chunks.mark_run(0, COUNT, SYNC_DIRTY)
    cut = group.take() if in_cut else None
    turns: list[int] = []

    async def bystander() -> None:
        while True:
            turns.append(
                int(np.count_nonzero(volume.chunks.view[::ZERO_STEP] & RESIDENCY_MASK != Residency.PRESENT))
            )
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        other = tasks.create_task(bystander())
        await volume.trim(0, SIZE)
        other.cancel()
    assert max(np.diff(turns)) == 1, "one step at a time"
    assert len(set(turns)) >= STEPS - 1
    assert volume.chunks.count_residency()[Residency.ZERO_UNPUNCHED] == COUNT
    assert bool((volume.chunks.view & FROZEN != 0).all()) is in_cut, "the cut still has the old content"
    if cut is not None:
        cut.commit()
        assert group.exposed_bytes == SIZE


def test_trimming_costs_a_few_passes_over_the_map():
    """All in one state, and in states that change with every chunk."""
    _, volume = huge(Residency.PRESENT)
    chunks = volume.chunks
    states = {
        "even": np.full(COUNT, Residency.PRESENT, dtype=np.uint8),
        "mixed": np.tile(np.array([Residency.PRESENT, Residency.ZERO], dtype=np.uint8), COUNT // 2),
    }
    for content in states.values():

        def trim(content: np.ndarray = content) -> float:
            chunks.view[:] = content
            start = time.perf_counter()
            for first in range(0, SIZE, ZERO_STEP << GEOMETRY.chunk_shift):
                assert volume.zero_nowait(first, ZERO_STEP << GEOMETRY.chunk_shift)
            return time.perf_counter() - start

        times = [(trim(), fastest(lambda: plain_pass(chunks))[0]) for _ in range(REPEATS)]
        ratio = min(trimmed for trimmed, _ in times) / min(plain for _, plain in times)
        assert ratio < PASSES_MAX, f"trimming took {ratio:.1f} passes"
        assert volume.chunks.count_residency()[Residency.PRESENT] == 0


def test_the_cut_after_it_is_one_short_step():
    """It cannot be divided: all volumes are seen at one instant. So it has to be short, whatever was trimmed."""
    group, volume = huge(Residency.ZERO_UNPUNCHED)
    chunks = volume.chunks

    def take() -> None:
        chunks.mark_run(0, COUNT, SYNC_DIRTY)
        cut = group.take()
        assert cut.volumes["disk"].zeros == [(0, COUNT)]
        cut.commit()

    taken, plain = fastest(take, lambda: plain_pass(chunks))
    assert taken / plain < PASSES_MAX, f"a cut took {taken / plain:.1f} passes"
    assert not (chunks.view & DIRTY_BITS).any()


async def test_a_flush_in_a_cut_lets_others_have_their_turn():
    """It finds a whole disk to punch, and that the cut still wants every chunk of it."""
    group, volume = huge(Residency.PRESENT)
    volume.chunks.mark_run(0, COUNT, SYNC_DIRTY)
    cut = group.take()
    await volume.trim(0, SIZE)
    turns = 0

    async def bystander() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        other = tasks.create_task(bystander())
        await volume.flush()
        other.cancel()
    assert turns > 100
    assert volume.chunks.count_residency()[Residency.ZERO_UNPUNCHED] == COUNT
    cut.abandon()
