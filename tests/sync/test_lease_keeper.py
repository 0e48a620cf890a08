"""What a guest notices of a lease: nothing, until the store is away for too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from silo.errors import FencedError
from silo.group import Group
from silo.sync.claim import Expectation
from silo.sync.committer import volume_infos
from silo.sync.lease_keeper import LeaseKeeper
from silo.sync.memory_store import MemoryStore
from silo.sync.register import Register
from silo.sync.store_faults import FaultKind, Verb
from silo.tasks import task_group
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated
from tests.support.sync import RETRY, make_group

T = 12.0


class StoppableClock(SimulatedClock):
    """Of a machine that can be suspended."""

    suspended_s = 0.0

    def boottime(self) -> float:
        return super().boottime() + self.suspended_s


@asynccontextmanager
async def kept(store: MemoryStore, clock: SimulatedClock) -> AsyncIterator[tuple[Group, Register]]:
    """A group whose lease is kept, and nothing else."""
    group = make_group(clock)
    register = Register(store.client("owner"), "vm1", clock, RETRY, lease_s=T)
    await register.claim(Expectation.opening(), volumes=volume_infos(group))
    assert register.lease is not None
    keeper = LeaseKeeper("vm1", register.lease, register, group.gate, clock)
    group.gate.look()
    async with task_group() as tasks:
        running = tasks.create_task(keeper.run())
        try:
            yield group, register
        finally:
            running.cancel()


@simulated
async def test_an_idle_group_costs_three_reads_per_lease(clock: SimulatedClock) -> None:
    store = MemoryStore(clock)
    async with kept(store, clock) as (group, register):
        before = len(store.log)
        for _ in range(100):
            await asyncio.sleep(T / 10)
            assert group.gate.is_open
        assert {operation.verb for operation in store.log[before:]} == {Verb.GET}
        assert 25 <= len(store.log) - before <= 35
        for _ in range(20):
            head = register.head
            assert head is not None
            before = len(store.log)
            await register.commit(head)
            await asyncio.sleep(T / 4)
            assert len(store.log) == before + 1, "a group that commits often is not looked at"


@simulated
async def test_a_guest_stalls_while_the_store_is_away(clock: SimulatedClock) -> None:
    """Not before the lease has ended; then reads and writes wait, and go on when it is confirmed."""
    store = MemoryStore(clock)
    async with kept(store, clock) as (group, register):
        disk = group.volumes["disk"]
        await disk.write(0, b"before")
        store.offline = True
        lease = register.lease
        assert lease is not None
        while clock.boottime() < lease.valid_until - 0.01:
            assert group.gate.is_open
            assert disk.read_nowait(0, 6) == b"before"
            await asyncio.sleep(0.5)
        await asyncio.sleep(1)
        assert not group.gate.is_open
        async with asyncio.TaskGroup() as tasks:
            write = tasks.create_task(disk.write(0, b"after."))
            read = tasks.create_task(disk.read(4096, 6))
            await asyncio.sleep(100)
            assert not write.done()
            assert not read.done()
            store.offline = False
            await asyncio.sleep(5)
            assert write.done()
            assert read.done()
        assert disk.read_nowait(0, 6) == b"after."


@simulated
async def test_a_store_that_hangs_stalls_the_guest_in_time(clock: SimulatedClock) -> None:
    store = MemoryStore(clock)
    async with kept(store, clock) as (group, register):
        store.inject(FaultKind.HOLD, times=None)
        assert register.lease is not None
        await asyncio.sleep(register.lease.valid_until - clock.boottime() + T / 4)
        assert not group.gate.is_open
        store.rules.clear()
        store.release_held()
        await asyncio.sleep(3)
        assert group.gate.is_open


@simulated
async def test_a_machine_that_was_suspended_serves_nothing_old(clock: SimulatedClock) -> None:
    """The first thing that it does is to look at the clock: not one request is served before the head was seen."""
    store = MemoryStore(clock)
    stoppable = StoppableClock(clock.loop)
    async with kept(store, stoppable) as (group, _):
        await group.volumes["disk"].write(0, b"old")
        stoppable.suspended_s += 3600
        group.gate.look()  # as whoever serves a batch does
        assert group.volumes["disk"].read_nowait(0, 3) is None
        assert not group.volumes["disk"].write_nowait(0, b"new")
        assert bytes(await group.volumes["disk"].read(0, 3)) == b"old"


@simulated
async def test_a_lost_group_is_closed_to_its_guest(clock: SimulatedClock, expect_log) -> None:
    expect_log("belongs to another writer")
    store = MemoryStore(clock)
    async with kept(store, clock) as (group, _):
        await Register(store.client(), "vm1", clock, RETRY).claim(Expectation.force())
        await asyncio.sleep(T)
        with pytest.raises(FencedError):
            await group.volumes["disk"].read(0, 3)


@simulated
async def test_a_gate_that_is_closed_for_a_handover_is_left_alone(clock: SimulatedClock) -> None:
    """The head may name the target by then. Once it is opened again the lease counts again."""
    store = MemoryStore(clock)
    async with kept(store, clock) as (group, register):
        await group.gate.close_and_drain()
        target = Register(store.client(), "vm1", clock, RETRY)
        await target.claim(Expectation.force())
        await asyncio.sleep(3 * T)
        assert group.gate.error is None
        assert not group.gate.is_open
        owner = target.owner
        assert owner is not None
        await register.claim(Expectation.opening(owner))
        assert not group.gate.is_open, "a confirmed lease opens no gate that was closed"
        group.gate.reopen()
        assert group.gate.is_open
        await asyncio.sleep(3 * T)
        assert group.gate.is_open
