"""A guest that makes content faster than the store takes it: the recovery point with and without throttling."""

from __future__ import annotations

import asyncio

import attrs

from silo.sync.memory_store import MemoryStore
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, SETTINGS, make_group, restored, syncing

MIB = 1 << 20
LINK_BPS = MIB
CHUNKS = 32 * MIB // CHUNK


async def burst(clock: SimulatedClock, *, throttle: bool) -> tuple[float, float]:
    """Write 4 MiB/s for a while over a link of 1 MiB/s. The worst RPO in the second half, and what was written."""
    store = MemoryStore(clock, latency_s=0.05)
    settings = attrs.evolve(
        SETTINGS, rpo_s=10.0, rate_bps=LINK_BPS, throttle=throttle, drain_timeout_s=600.0, cut_size=64 * MIB
    )
    group = make_group(clock, {"disk": 32 * MIB})
    worst, written = 0.0, 0
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        content = clock.token(CHUNK - 8)
        it.disk.write_nowait(0, content * 2048)
        await it.syncer.sync_now()
        async with asyncio.TaskGroup() as tasks:

            async def look() -> None:
                while True:
                    await asyncio.sleep(1)
                    it.syncer.look()

            looking = tasks.create_task(look())
            stop = clock.monotonic() + 100
            while clock.monotonic() < stop:
                for _ in range(MIB // CHUNK):
                    chunk = clock.random.randrange(CHUNKS)
                    await it.disk.write(chunk * CHUNK, clock.token(8) + content)
                written += MIB
                await asyncio.sleep(1 / 4)
                if clock.monotonic() > stop - 60:
                    worst = max(worst, it.syncer.status.rpo_s)
            looking.cancel()
        status = it.syncer.status
        assert ("behind" in status.alarms) is (status.rpo_s > 15.0)
        await it.syncer.sync_now()
        assert await restored(store.client(), clock) == it.image()
        it.syncer.look()
        assert group.throttle.rate_bps is None
    return worst, written


@simulated
async def test_throttling_keeps_the_recovery_point(clock: SimulatedClock) -> None:
    """The backlog is bounded by the disk in any case; with throttling the guest waits, and the target is kept."""
    free_rpo, free_written = await burst(clock, throttle=False)
    kept_rpo, kept_written = await burst(clock, throttle=True)
    assert free_rpo > 20.0
    assert kept_rpo < 15.0
    assert kept_written < free_written / 2
