"""Hosts that were stopped for a while, and hosts whose calendars disagree."""

from __future__ import annotations

import asyncio

import pytest

from silo.errors import FencedError
from silo.sync.claim import Expectation
from silo.sync.memory_store import MemoryStore
from silo.sync.store_faults import Verb
from silo.testing.loop import SimulatedClock
from tests.support.logs import ExpectedLogs
from tests.support.simulated import simulated
from tests.support.sync import make_group, restored, syncing

DAY_S = 86400.0


class StoppableClock(SimulatedClock):
    """Of a machine that can be suspended: its boot time goes on meanwhile."""

    suspended_s = 0.0

    def boottime(self) -> float:
        return super().boottime() + self.suspended_s


def gets(store: MemoryStore) -> int:
    """How often a head was read."""
    return sum(operation.verb is Verb.GET and operation.key == "vm1/head" for operation in store.log)


@simulated
async def test_an_idle_writer_that_was_stopped_looks_at_the_head(clock: SimulatedClock, expect_log) -> None:
    """It has nothing to store, so no commit would tell it that it was replaced."""
    expect_log("belongs to another writer")
    store = MemoryStore(clock)
    stoppable = StoppableClock(clock.loop)
    async with syncing(store.client("old"), stoppable, drain=False) as old:
        await old.write(1, b"old")
        await old.syncer.sync_now()
        async with syncing(
            store.client("new"), clock, group=make_group(clock), expectation=Expectation.force()
        ) as new:
            await new.syncer.sync_now()
            await asyncio.sleep(60)
            assert bytes(await old.disk.read(4096, 3)) == b"old", "nothing has told it"
            stoppable.suspended_s += 60
            await asyncio.sleep(10)
            with pytest.raises(FencedError):
                await old.disk.read(4096, 3)


@simulated
async def test_an_idle_writer_asks_the_store_for_nothing(clock: SimulatedClock) -> None:
    """Unless it was stopped; then once."""
    store = MemoryStore(clock)
    stoppable = StoppableClock(clock.loop)
    async with syncing(store.client(), stoppable) as it:
        await it.syncer.sync_now()
        before = len(store.log)
        await asyncio.sleep(600)
        assert len(store.log) == before
        stoppable.suspended_s += 60
        await asyncio.sleep(60)
        assert len(store.log) == before + 1
        await it.write(1, b"goes on")
        await it.syncer.sync_now()


@pytest.mark.parametrize("skew_s", [-400 * DAY_S, 400 * DAY_S])
def test_calendars_that_disagree_decide_nothing(skew_s: float, expect_log: ExpectedLogs) -> None:
    """Neither who owns the group nor what is in a generation; and an RPO is never negative."""

    async def scenario(clock: SimulatedClock) -> None:
        store = MemoryStore(clock)
        other = SimulatedClock(clock.loop, wall_skew_s=skew_s)
        async with syncing(store.client("old"), clock) as old:
            await old.write(1, b"old")
            await old.syncer.sync_now()
        taken = Expectation.opening()
        async with syncing(store.client("new"), other, group=make_group(other), expectation=taken) as new:
            assert new.syncer.status.rpo_s >= 0
            await new.write(1, b"new")
            assert await new.syncer.sync_now() == 2
            assert new.syncer.status.rpo_s < 5
            with pytest.raises(FencedError):
                await old.register.commit(old.head)
            assert await restored(store.client(), clock) == new.image()

    simulated(scenario)(expect_log)
