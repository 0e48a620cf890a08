"""Ranged reads: lanes, patience, and objects that are not what they should be."""

from __future__ import annotations

import asyncio

import attrs
import pytest

from silo.errors import CorruptionError, UnavailableError
from silo.sync.memory_store import MemoryStore
from silo.sync.reader import StoreReader
from silo.sync.store_faults import FaultKind, Verb
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated
from tests.support.sync import FETCH


@simulated
async def test_exactly_the_range_or_an_error(clock: SimulatedClock) -> None:
    """A missing object is None; one that is too short is corrupt, wherever it ends."""
    store = MemoryStore(clock)
    store.place("a", b"0123456789")
    reader = StoreReader(store.client(), clock, FETCH)
    for demand in (True, False):
        assert await reader.read("a", 2, 3, demand=demand) == b"234"
        assert await reader.read("b", 2, 3, demand=demand) is None
        for offset in (8, 10, 11):
            with pytest.raises(CorruptionError, match="shorter"):
                await reader.read("a", offset, 3, demand=demand)
    assert await reader.read_object("a") == b"0123456789"
    assert await reader.read_object("b") is None
    assert reader.bytes_read == 6


@simulated
async def test_demand_has_patience_and_lanes_of_its_own(clock: SimulatedClock) -> None:
    """One stuck background request does not delay a guest; a store that recovers in time answers it."""
    store = MemoryStore(clock)
    store.place("a", b"0123456789")
    reader = StoreReader(store.client(), clock, attrs.evolve(FETCH, background_lanes=1, demand_lanes=1))
    store.inject(FaultKind.HOLD, Verb.GET)
    async with asyncio.TaskGroup() as tasks:
        stuck = tasks.create_task(reader.read("a", 0, 1, demand=False))
        await store.wait_held()
        waiting = tasks.create_task(reader.read("a", 1, 1, demand=False))
        store.inject(FaultKind.FAIL, Verb.GET, times=3)
        assert await reader.read("a", 2, 1, demand=True) == b"2"
        assert not stuck.done()
        assert not waiting.done()
        store.release_held()
    store.inject(FaultKind.FAIL, Verb.GET)
    with pytest.raises(UnavailableError):
        await reader.read("a", 0, 1, demand=False)


@simulated
async def test_a_request_that_hangs_is_given_up(clock: SimulatedClock) -> None:
    store = MemoryStore(clock)
    store.place("a", b"0123456789")
    reader = StoreReader(store.client(), clock, FETCH)
    store.inject(FaultKind.HOLD, Verb.GET, times=None)
    with pytest.raises(UnavailableError, match="within"):
        await reader.read("a", 0, 1, demand=False)
