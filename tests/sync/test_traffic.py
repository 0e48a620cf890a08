"""Demand reads before everything else, and never for ever."""

from __future__ import annotations

import asyncio

import pytest

from silo.sync.layout import SegmentName
from silo.sync.memory_store import MemoryStore
from silo.sync.reader import StoreReader
from silo.sync.sender import ObjectSender
from silo.sync.settings import SyncSettings
from silo.sync.store_faults import FaultKind, Verb
from silo.sync.traffic import Traffic
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated


@simulated
async def test_the_background_gives_way_for_a_bounded_time(clock: SimulatedClock) -> None:
    """Until nobody waits any more, or until it has waited for long enough; at once when nobody does."""
    traffic = Traffic(give_way_s=0.5)
    await traffic.give_way()
    assert (clock.monotonic(), traffic.gave_way) == (pytest.approx(clock.monotonic()), 0)
    for reads_s, waits_s in ((0.2, 0.2), (5.0, 0.5)):
        async with asyncio.TaskGroup() as tasks:

            async def read(reads_s: float) -> None:
                with traffic.demand():
                    await asyncio.sleep(reads_s)

            for share in (1.0, 0.5):
                tasks.create_task(read(reads_s * share))
            await asyncio.sleep(0)
            started = clock.monotonic()
            await traffic.give_way()
            assert clock.monotonic() - started == pytest.approx(waits_s)
    assert traffic.gave_way == 2


@simulated
async def test_uploads_and_hydration_let_demand_reads_overtake(clock: SimulatedClock) -> None:
    """What began before goes on; what was about to begin does so after the read."""
    store = MemoryStore(clock, latency_s=0.1)
    await store.client().put("vm1/segments/x", [b"x" * 100])
    reader = StoreReader(store.client("reads"), clock)
    sender = ObjectSender(store.client("sends"), "vm1", SyncSettings(), clock, reader.traffic)
    store.inject(FaultKind.DELAY, Verb.GET, client="reads", delay_s=0.2)
    before = len(store.log)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(reader.read("vm1/segments/x", 0, 10, demand=True))
        await asyncio.sleep(0.01)
        tasks.create_task(sender.send(SegmentName("vm1", 1, 1, "0" * 16), [b"data"], 4))
        tasks.create_task(reader.read("vm1/segments/x", 10, 10, demand=False))
        await asyncio.sleep(0.1)
        assert len(store.log) == before + 1
    assert {operation.verb for operation in store.log[before + 1 :]} == {Verb.PUT_IF, Verb.GET}
    assert reader.traffic.gave_way == 2


@simulated
async def test_a_read_that_is_cancelled_holds_nobody_up(clock: SimulatedClock) -> None:
    store = MemoryStore(clock, latency_s=10.0)
    reader = StoreReader(store.client(), clock)
    read = asyncio.create_task(reader.read("vm1/head", 0, 10, demand=True))
    await asyncio.sleep(1)
    read.cancel()
    await asyncio.wait((read,))
    started = clock.monotonic()
    await reader.traffic.give_way()
    assert clock.monotonic() == started
