"""Forks, points and readers: records that keep generations, on the simulated store."""

from __future__ import annotations

import asyncio

import attrs
import pytest

from silo.errors import InvalidRequestError, UnavailableError
from silo.sync.claim import Expectation
from silo.sync.fork import delete_group, fork_group
from silo.sync.head import Head, Keeping
from silo.sync.memory_store import MemoryStore
from silo.sync.pins import PIN_LASTS_S
from silo.sync.reader import StoreReader
from silo.sync.store_faults import FaultKind, Verb
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, FETCH, make_group, restored, syncing
from tests.sync.test_caretaker import TIDY, caretaker_of, keeper_of

SETTINGS = attrs.evolve(TIDY, checkpoint_segments=1)


async def fork(store: MemoryStore, clock: SimulatedClock, source: str, group: str, **which: int) -> Head:
    """By somebody with nothing but the store."""
    client = store.client("forker")
    return await fork_group(client, StoreReader(client, clock, FETCH), clock, source, group, **which)


async def delete(store: MemoryStore, clock: SimulatedClock, group: str, *, force: bool = False) -> int:
    """The same."""
    client = store.client("deleter")
    return await delete_group(client, StoreReader(client, clock, FETCH), clock, group, force=force)


def keys_of(store: MemoryStore, group: str) -> list[str]:
    """What there is of a group."""
    return [key for key in store.snapshot() if key.startswith(f"{group}/")]


async def make_golden(store: MemoryStore, clock: SimulatedClock) -> dict[str, bytes]:
    """A group with some content, released."""
    async with syncing(store.client(), clock, settings=SETTINGS) as it:
        for chunk in range(8):
            await it.disk.write(chunk * CHUNK, clock.token(CHUNK))
        await it.syncer.sync_now()
        return it.image()


@simulated
async def test_ten_forks_of_one_image(clock: SimulatedClock) -> None:
    """Each costs a few small objects, is opened like any released group, and goes its own way."""
    store = MemoryStore(clock)
    golden = await make_golden(store, clock)
    before = len(store.snapshot())
    for number in range(10):
        await fork(store, clock, "vm1", f"ci-{number}")
    assert len(store.snapshot()) == before + 20
    group = make_group(clock, name="ci-3")
    async with syncing(store.client(), clock, group=group, settings=SETTINGS) as it:
        await it.disk.write(0, b"mine" * (CHUNK // 4))
        await it.syncer.sync_now()
    expected = b"mine" * (CHUNK // 4) + golden["disk"][CHUNK:]
    assert (await restored(store.client(), clock, "ci-3"))["disk"] == expected
    assert await restored(store.client(), clock, "ci-4") == golden == await restored(store.client(), clock)


@simulated
async def test_the_collector_of_the_parent_respects_forks(clock: SimulatedClock) -> None:
    """However much the parent overwrites; and when the last fork is deleted, its space is free."""
    store = MemoryStore(clock)
    golden = await make_golden(store, clock)
    await fork(store, clock, "vm1", "ci")
    await fork(store, clock, "ci", "ci-of-ci")
    group = make_group(clock)
    expectation = Expectation.opening()
    async with syncing(store.client(), clock, group=group, settings=SETTINGS, expectation=expectation) as it:
        caretaker = caretaker_of(it, clock)
        for _ in range(4):
            for chunk in range(8):
                await it.disk.write(chunk * CHUNK, clock.token(CHUNK))
            await it.syncer.sync_now()
            await caretaker.collect(hurry=True)
        assert await restored(store.client(), clock, "ci") == golden
        kept = (await caretaker.collect(hurry=True)).record_bytes
        assert kept >= 8 * CHUNK
        with pytest.raises(InvalidRequestError, match="ci-of-ci"):
            await delete(store, clock, "ci")
        await delete(store, clock, "ci-of-ci")
        await delete(store, clock, "ci")
        assert keys_of(store, "ci") == keys_of(store, "ci-of-ci") == []
        report = await caretaker.collect(hurry=True)
        assert report.deleted_bytes >= kept
        assert report.forks == ()
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_a_grandchild_outlives_its_parent(clock: SimulatedClock) -> None:
    """It has pins of its own in every group that owns something of it."""
    store = MemoryStore(clock)
    golden = await make_golden(store, clock)
    await fork(store, clock, "vm1", "ci")
    head = await fork(store, clock, "ci", "ci-of-ci")
    assert sorted(pin.split("/")[0] for pin in head.parents) == ["ci", "vm1"]
    with pytest.raises(InvalidRequestError, match="shares objects"):
        await delete(store, clock, "vm1")
    assert await restored(store.client(), clock, "ci-of-ci") == golden


@simulated
async def test_a_fork_that_overwrote_everything_lets_its_parent_go(clock: SimulatedClock) -> None:
    """Its collector notices: the pin is withdrawn, and the parent can be deleted."""
    store = MemoryStore(clock)
    await make_golden(store, clock)
    await fork(store, clock, "vm1", "ci")
    group = make_group(clock, name="ci")
    async with syncing(store.client(), clock, group=group, settings=SETTINGS) as it:
        caretaker = caretaker_of(it, clock)
        for chunk in range(64):
            await it.disk.write(chunk * CHUNK, clock.token(CHUNK))
        await it.syncer.sync_now()
        it.syncer.amendments.wants_checkpoint = True
        await it.syncer.sync_now()
        assert (await caretaker.collect(hurry=True)).released_pins == 1
        assert it.head.parents == ()
        await delete(store, clock, "vm1")
        assert await restored(store.client(), clock, "ci") == it.image()


@simulated
async def test_a_fork_of_a_point(clock: SimulatedClock) -> None:
    """It rests on the point's record, and needs it no more once it is made."""
    store = MemoryStore(clock)
    keeper = keeper_of(store.client("operator"), clock)
    golden = await make_golden(store, clock)
    point = await keeper.keep_newest("vm1", Keeping.POINT, label="golden")
    async with syncing(store.client(), clock, settings=SETTINGS) as it:
        caretaker = caretaker_of(it, clock)
        for _ in range(3):
            await it.disk.write(0, clock.token(8 * CHUNK))
            await it.syncer.sync_now()
            await caretaker.collect(hurry=True)
        await fork(store, clock, "vm1", "ci", generation=point.head.generation)
        await keeper.withdraw(point.key)
        await caretaker.collect(hurry=True)
        assert await restored(store.client(), clock, "ci") == golden


@simulated
async def test_a_generation_is_found_by_number_and_by_time(clock: SimulatedClock) -> None:
    """The newest that fits; and it says what there is when nothing does."""
    store = MemoryStore(clock)
    keeper = keeper_of(store.client("operator"), clock)
    async with syncing(store.client(), clock, settings=SETTINGS) as it:
        times = []
        for number in range(4):
            await it.write(0, b"%d" % number)
            await it.syncer.sync_now()
            times.append(it.head.cut_time)
            if number < 2:
                await keeper.keep_newest("vm1", Keeping.POINT)
            await asyncio.sleep(100)
        points = [point.head.generation for point in await keeper.points("vm1")]
        assert len(points) == 2
        newest = it.head.generation
        assert (await keeper.find("vm1")).generation == newest
        assert (await keeper.find("vm1", generation=points[0])).generation == points[0]
        assert (await keeper.find("vm1", at=it.head.cut_time)).generation == newest
        assert (await keeper.find("vm1", at=times[2] - 1)).generation == points[1]
        with pytest.raises(InvalidRequestError, match="no such generation"):
            await keeper.find("vm1", generation=points[1] + 1)
        with pytest.raises(InvalidRequestError, match="no such generation"):
            await keeper.find("vm1", at=times[0] - 1)


@simulated
async def test_readers_are_kept_for_a_day(clock: SimulatedClock) -> None:
    """A pin that nobody withdraws counts no more then; a fork's counts as long as the fork names it."""
    store = MemoryStore(clock)
    await make_golden(store, clock)
    keeper = keeper_of(store.client("operator"), clock)
    await fork(store, clock, "vm1", "ci")
    await keeper.keep_newest("vm1", Keeping.READER)
    await keeper.keep_newest("vm1", Keeping.FORK, holder="never-made")
    assert await keeper.outdated(await keeper.pins("vm1")) == []
    await asyncio.sleep(PIN_LASTS_S + 1)
    outdated = await keeper.outdated(await keeper.pins("vm1"))
    assert sorted(pin.kept.holder for pin in outdated) == ["", "never-made"]


@simulated
async def test_lost_answers_make_no_second_fork(clock: SimulatedClock) -> None:
    """What was written and not answered is recognised."""
    store = MemoryStore(clock)
    golden = await make_golden(store, clock)
    store.inject(FaultKind.LOSE_RESPONSE, Verb.PUT_IF, client="forker", times=2)
    await fork(store, clock, "vm1", "ci")
    assert await restored(store.client(), clock, "ci") == golden
    with pytest.raises(InvalidRequestError, match="already"):
        await fork(store, clock, "vm1", "ci")
    store.inject(FaultKind.LOSE_RESPONSE, Verb.PUT_IF, client="deleter", times=1)
    await delete(store, clock, "ci")
    await delete(store, clock, "vm1")
    assert store.snapshot() == {}


@simulated
async def test_a_group_that_is_being_deleted_cannot_be_kept(clock: SimulatedClock) -> None:
    """The floor above its generation says so, before the head is gone."""
    store = MemoryStore(clock)
    await make_golden(store, clock)
    store.inject(FaultKind.FAIL, Verb.DELETE, client="deleter", times=None)
    with pytest.raises(UnavailableError):
        await delete(store, clock, "vm1")
    with pytest.raises(UnavailableError, match="being deleted"):
        await fork(store, clock, "vm1", "ci")
