"""Flushes that reach the store: what they cover, what they share, and how they fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from silo.devices.memory import MemoryDevice
from silo.errors import ClosedError, FencedError, UnavailableError
from silo.flushing import StoreFlush
from silo.geometry import Geometry
from silo.group import Group
from silo.storelink import StoreLink
from silo.sync.claim import Expectation
from silo.sync.committer import volume_infos
from silo.sync.memory_store import MemoryStore
from silo.sync.register import Register
from silo.sync.settings import RetrySettings, SyncSettings
from silo.sync.store_faults import Verb
from silo.tasks import task_group
from silo.testing.loop import SimulatedClock
from tests.support.logs import ExpectedLogs
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, restored

SIZE = 256 * CHUNK
SETTINGS = SyncSettings(rpo_s=3600.0, flush_timeout_s=10.0, retry=RetrySettings(delay_max_s=1.0))


async def prepare(owner: object, nonce: str) -> None:
    """Nothing is remembered here."""


class Scene:
    """A group that is synced once an hour unless something flushes it."""

    def __init__(self, group: Group, link: StoreLink, tasks: asyncio.TaskGroup) -> None:
        self.group = group
        self.disk = group.volumes["disk"]
        self.link = link
        self.tasks = tasks
        self._flush = StoreFlush(group, link, SETTINGS.flush_timeout_s)

    async def flush(self) -> None:
        await self._flush.flush(self.disk)


@asynccontextmanager
async def scene(store: MemoryStore, clock: SimulatedClock, *, start: bool = True) -> AsyncIterator[Scene]:
    group = Group("vm1", clock)
    group.add("disk", MemoryDevice(SIZE), Geometry(SIZE, chunk_size=CHUNK))
    link = await StoreLink.open("vm1", store.client(), clock, prepare=prepare, owns_store=True, sync=SETTINGS)
    await link.claim_opening(Expectation.opening(), volume_infos(group))
    async with task_group() as tasks:
        here = Scene(group, link, tasks)
        if start:
            await link.start(group, tasks)
        try:
            yield here
        finally:
            await link.close(drain=False)


def heads(store: MemoryStore) -> int:
    """How often the head was written."""
    return sum(operation.verb is Verb.PUT_IF and operation.key == "vm1/head" for operation in store.log)


@simulated
async def test_a_flush_is_in_the_store_when_it_returns(clock: SimulatedClock) -> None:
    """Whatever was acknowledged before it, again and again; and without anything dirty it costs no request."""
    store = MemoryStore(clock, latency_s=0.05)
    async with scene(store, clock) as here:
        for number in range(5):
            await here.disk.write(number * CHUNK, clock.token(100))
            await here.flush()
            found = await restored(store.clone().client(), clock)
            assert found["disk"] == bytes(await here.disk.read(0, SIZE))
        requests = len(store.log)
        await here.flush()
        assert len(store.log) == requests


@simulated
async def test_many_flushes_share_a_commit(clock: SimulatedClock) -> None:
    """Each is covered by the commit that answers it, though there are far fewer commits than flushes."""
    store = MemoryStore(clock, latency_s=0.1)
    async with scene(store, clock) as here:
        before = heads(store)

        async def write_and_flush(chunk: int) -> None:
            await asyncio.sleep(clock.random.uniform(0, 1))
            content = clock.token(64)
            await here.disk.write(chunk * CHUNK, content)
            await here.flush()
            found = await restored(store.clone().client(), clock)
            assert found["disk"][chunk * CHUNK : chunk * CHUNK + 64] == content

        async with asyncio.TaskGroup() as tasks:
            for chunk in range(200):
                tasks.create_task(write_and_flush(chunk))
        assert 2 <= heads(store) - before <= 10


@simulated
async def test_a_flush_that_the_store_does_not_take_fails_in_time(clock: SimulatedClock) -> None:
    """And is made good by the next that succeeds: it covers what the failed one was to cover."""
    store = MemoryStore(clock)
    async with scene(store, clock) as here:
        store.offline = True
        await here.disk.write(0, b"one")
        started = clock.monotonic()
        with pytest.raises(UnavailableError, match="has not taken a flush"):
            await here.flush()
        assert clock.monotonic() - started == pytest.approx(SETTINGS.flush_timeout_s, abs=0.1)
        store.offline = False
        await here.flush()
        assert (await restored(store.client(), clock))["disk"][:3] == b"one"


@simulated
async def test_a_fenced_group_flushes_no_more(clock: SimulatedClock, expect_log: ExpectedLogs) -> None:
    """The flush that finds it out fails, and so do all later ones, though nothing new is dirty."""
    expect_log("belongs to another writer")
    store = MemoryStore(clock)
    async with scene(store, clock) as here:
        await here.disk.write(0, b"one")
        await here.flush()
        await Register(store.client("other"), "vm1", clock).claim(Expectation.force(), prepare=prepare)
        await here.disk.write(0, b"two")
        for _ in range(2):
            with pytest.raises(FencedError):
                await here.flush()


@simulated
async def test_the_time_of_a_migration_does_not_count(clock: SimulatedClock) -> None:
    """Commits are held for longer than a flush may take; it returns when they go on."""
    store = MemoryStore(clock)
    async with scene(store, clock) as here:
        await here.link.hold_commits()
        await here.disk.write(0, b"one")
        async with asyncio.TaskGroup() as tasks:
            flush = tasks.create_task(here.flush())
            await asyncio.sleep(5 * SETTINGS.flush_timeout_s)
            assert not flush.done()
            await here.link.release_commits()
        assert (await restored(store.client(), clock))["disk"][:3] == b"one"


@simulated
async def test_a_group_that_has_just_arrived_is_waited_for(clock: SimulatedClock) -> None:
    """Its syncer starts a while after its guest does; one that never starts ends the flush."""
    store = MemoryStore(clock)
    async with scene(store, clock, start=False) as here:
        await here.disk.write(0, b"one")
        async with asyncio.TaskGroup() as tasks:
            flush = tasks.create_task(here.flush())
            await asyncio.sleep(3)
            assert not flush.done()
            await here.link.start(here.group, here.tasks)
        assert (await restored(store.client(), clock))["disk"][:3] == b"one"
    await here.disk.write(0, b"two")
    here.group.gate.fail(ClosedError("group vm1 was closed"))
    with pytest.raises(ClosedError):
        await here.flush()


@simulated
async def test_the_local_disk_is_flushed_as_well(clock: SimulatedClock) -> None:
    """A host that comes back after a power loss trusts its disk: what the store has must be there, too."""
    store = MemoryStore(clock)
    async with scene(store, clock) as here:
        flushed: list[bytes] = []
        flush = here.disk.device.flush

        async def note_and_flush() -> None:
            await flush()
            flushed.append(bytes(here.disk.device.read_nowait(0, 3) or b""))

        here.disk.device.flush = note_and_flush  # type: ignore[method-assign]
        await here.disk.write(0, b"one")
        await here.flush()
        assert flushed == [b"one"]
