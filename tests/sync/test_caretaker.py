"""The owner's housekeeping, on the simulated store: space, points, and what may never be deleted."""

from __future__ import annotations

import asyncio
import itertools
import random

import attrs

from silo.abc import ObjectStore
from silo.sync.caretaker import Caretaker
from silo.sync.head import Keeping
from silo.sync.layout import segments_prefix
from silo.sync.memory_store import MemoryStore
from silo.sync.pins import Keeper
from silo.sync.reader import StoreReader
from silo.sync.retention import RetentionPolicy
from silo.sync.settings import CollectorSettings
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, FETCH, SETTINGS, Syncing, make_group, restored, syncing

EAGER = CollectorSettings(interval_s=30.0, grace_s=0.0, pause_s=1.0)
TIDY = attrs.evolve(SETTINGS, collector=EAGER)


def caretaker_of(
    it: Syncing,
    clock: SimulatedClock,
) -> Caretaker:
    """The one that belongs to a syncing group."""
    reader = StoreReader(it.store, clock, FETCH)
    return Caretaker(it.group, it.syncer, it.store, reader, clock)


def keeper_of(store: ObjectStore, clock: SimulatedClock) -> Keeper:
    """Somebody else's, with nothing but the store."""
    return Keeper(store, StoreReader(store, clock, FETCH), clock)


def stored_bytes(store: MemoryStore) -> int:
    """What lies under the group's segments."""
    return sum(len(data) for key, data in store.snapshot().items() if key.startswith(segments_prefix("vm1")))


@simulated
async def test_what_was_overwritten_is_deleted(clock: SimulatedClock) -> None:
    """Whole dead segments and old pages of the map go; what the newest generation shows stays."""
    store = MemoryStore(clock)
    settings = attrs.evolve(TIDY, checkpoint_segments=1)
    async with syncing(store.client(), clock, settings=settings) as it:
        caretaker = caretaker_of(it, clock)
        for _ in range(6):
            for chunk in range(8):
                await it.disk.write(chunk * CHUNK, clock.token(CHUNK))
            await it.syncer.sync_now()
        before = stored_bytes(store)
        first = await caretaker.collect(hurry=True)
        second = await caretaker.collect(hurry=True)
        assert first.deleted_objects + second.deleted_objects >= 4
        assert stored_bytes(store) <= before - first.deleted_bytes - second.deleted_bytes + 4096
        assert it.head.gc_floor > 0
        assert (await caretaker.collect(hurry=True)).deleted_objects == 0
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_a_dry_run_changes_nothing(clock: SimulatedClock) -> None:
    """It says what would be deleted, and that is what is deleted then."""
    store = MemoryStore(clock)
    settings = attrs.evolve(TIDY, checkpoint_segments=1)
    async with syncing(store.client(), clock, settings=settings) as it:
        caretaker = caretaker_of(it, clock)
        for _ in range(4):
            await it.disk.write(0, clock.token(8 * CHUNK))
            await it.syncer.sync_now()
        it.syncer.amendments.wants_checkpoint = True
        await it.syncer.sync_now()
        snapshot = store.snapshot()
        planned = await caretaker.collect(dry_run=True)
        assert store.snapshot() == snapshot
        assert planned.deleted_objects > 0
        done = await caretaker.collect(hurry=True)
        assert (done.deleted_objects, done.deleted_bytes) == (planned.deleted_objects, planned.deleted_bytes)


@simulated
async def test_space_stays_small_under_random_overwriting(clock: SimulatedClock) -> None:
    """Segments of which a little is still needed are emptied: what is stored stays near what is live."""
    store = MemoryStore(clock)
    group = make_group(clock, {"disk": 512 * CHUNK})
    settings = attrs.evolve(TIDY, checkpoint_segments=4, segment_size=16 * CHUNK)
    chance = random.Random(7)
    ratios = []
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        caretaker = caretaker_of(it, clock)
        for chunk in range(512):
            await it.disk.write(chunk * CHUNK, clock.token(CHUNK))
        for round_ in range(80):
            await it.syncer.sync_now()
            await caretaker.collect(hurry=True)
            for _ in range(32):
                await it.disk.write(chance.randrange(512) * CHUNK, clock.token(CHUNK))
            if round_ > 20:
                ratios.append(stored_bytes(store) / (512 * CHUNK))
        assert max(ratios) <= 1.5, ratios
        written = 80 * 32 * CHUNK
        assert 0 < caretaker.totals.rewritten_bytes < 2 * written
        await it.syncer.sync_now()
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_a_point_keeps_its_generation(clock: SimulatedClock) -> None:
    """However much is overwritten and collected afterwards; and its space is given back when it is deleted."""
    store = MemoryStore(clock)
    settings = attrs.evolve(TIDY, checkpoint_segments=1)
    keeper = keeper_of(store.client("operator"), clock)
    async with syncing(store.client(), clock, settings=settings) as it:
        caretaker = caretaker_of(it, clock)
        for chunk in range(8):
            await it.write(chunk, b"old" + clock.token(64))
        await it.syncer.sync_now()
        old = it.image()
        point = await keeper.keep_newest("vm1", Keeping.POINT, label="before the upgrade")
        for _ in range(5):
            for chunk in range(8):
                await it.write(chunk, b"new" + clock.token(64))
            await it.syncer.sync_now()
            await caretaker.collect(hurry=True)
        assert it.head.gc_floor > point.head.generation
        assert await restored(store.client(), clock, body=point.head) == old
        assert await restored(store.client(), clock) == it.image()
        kept = (await caretaker.collect(hurry=True)).record_bytes
        assert kept > 0
        await keeper.withdraw(point.key)
        assert (await caretaker.collect(hurry=True)).deleted_bytes == kept


@simulated
async def test_automatic_points(clock: SimulatedClock) -> None:
    """Made as often as the policy says, after commits alone, and dropped when no rule wants them."""
    store = MemoryStore(clock)
    settings = attrs.evolve(TIDY, points=RetentionPolicy(every_s=600, last=3, hourly=0, daily=0))
    keeper = keeper_of(store.client("operator"), clock)
    async with syncing(store.client(), clock, settings=settings) as it, asyncio.TaskGroup() as tasks:
        caretaker = caretaker_of(it, clock)
        running = tasks.create_task(caretaker.run())
        for _ in range(50):
            await it.write(1, clock.token(64))
            await asyncio.sleep(60)
        await asyncio.sleep(600)
        points = await keeper.points("vm1")
        assert len(points) == 3
        times = [point.head.cut_time for point in points]
        assert all(600 <= later - earlier < 700 for earlier, later in itertools.pairwise(times))
        await asyncio.sleep(3600)
        assert [point.key for point in await keeper.points("vm1")] == [point.key for point in points]
        running.cancel()


@simulated
async def test_an_idle_group_sends_nothing(clock: SimulatedClock) -> None:
    """Once what was dead is deleted, the caretaker is silent."""
    store = MemoryStore(clock)
    settings = attrs.evolve(TIDY, checkpoint_segments=1, collector=attrs.evolve(EAGER, grace_s=100.0))
    async with syncing(store.client(), clock, settings=settings) as it, asyncio.TaskGroup() as tasks:
        caretaker = caretaker_of(it, clock)
        running = tasks.create_task(caretaker.run())
        for _ in range(6):
            await it.disk.write(0, clock.token(8 * CHUNK))
            await it.syncer.sync_now()
        await asyncio.sleep(1000)
        assert caretaker.totals.deleted_objects > 3
        assert caretaker.error == ""
        requests = len(store.log)
        await asyncio.sleep(10_000)
        assert len(store.log) == requests
        running.cancel()
