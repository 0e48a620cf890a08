"""Locked and written chunks: who gets in, who waits, and who is woken."""

from __future__ import annotations

import asyncio

import pytest

from silo.chunklocks import ChunkLocks
from silo.chunkmap import LOCKED, ChunkMap, Residency
from silo.errors import InvariantError
from tests.support.held import everything_else, interleaved

ABSENT, PRESENT = Residency.ABSENT_STORE, Residency.PRESENT


def locks_on(*residencies: Residency) -> tuple[ChunkLocks, ChunkMap]:
    chunks = ChunkMap(bytearray(residencies), len(residencies))
    return ChunkLocks(chunks), chunks


def locked(chunks: ChunkMap) -> list[int]:
    return chunks.select(LOCKED, LOCKED).tolist()


def test_a_locked_run_is_busy_for_its_time():
    """Only the run, and only until the block is left, also by an error."""
    locks, chunks = locks_on(*[ABSENT] * 5)
    with pytest.raises(ZeroDivisionError), locks.locked(1, 3):
        assert locked(chunks) == [1, 2]
        assert (locks.busy(0, 5), locks.busy(2, 5), locks.busy(3, 5)) == (1, 2, None)
        raise ZeroDivisionError
    assert locked(chunks) == []
    assert locks.busy(0, 5) is None


def test_a_write_shares_what_is_present_and_locks_the_rest():
    """Another write may share the same chunk; each ends for itself."""
    locks, chunks = locks_on(PRESENT, ABSENT, PRESENT)
    with locks.writing(0, 3):
        assert locked(chunks) == [1]
        assert locks.written == [0, 2]
        with locks.writing(2, 3):
            assert locks.written == [0, 2]
        assert locks.busy(2, 3) == 2
        chunks.set_residency(1, PRESENT)
    assert (locked(chunks), locks.written) == ([], [])


def test_two_locks_are_a_bug():
    """Neither way of having a chunk goes with somebody's lock; what was there stays."""
    locks, chunks = locks_on(PRESENT, ABSENT)
    with locks.locked(1, 2):
        for second in (locks.locked(0, 2), locks.writing(0, 2)):
            with pytest.raises(InvariantError, match="locked twice"), second:
                pytest.fail("two phases on one chunk")
        assert locked(chunks) == [1]
        assert locks.written == []


@interleaved
async def test_waiters_are_woken_when_a_phase_ends():
    """All of them; whoever still finds the chunk busy waits again."""
    locks, _ = locks_on(PRESENT, ABSENT)
    woken = []

    async def wait(chunk: int) -> None:
        await locks.wait(chunk)
        woken.append(chunk)

    async with asyncio.TaskGroup() as tasks:
        with locks.writing(0, 2):
            tasks.create_task(wait(0))
            tasks.create_task(wait(0))
            tasks.create_task(wait(1))
            with locks.writing(0, 1):
                await everything_else()
            await everything_else()
            assert woken == [], "the first write is still there"
    assert sorted(woken) == [0, 0, 1]
