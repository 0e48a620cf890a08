"""Sending objects: keys of their own, a window, attempts without end."""

from __future__ import annotations

import asyncio

import attrs
import pytest

from silo.errors import CapacityError, InvariantError
from silo.sync.claim import Owner
from silo.sync.memory_store import MemoryStore
from silo.sync.sender import ObjectSender
from silo.sync.store_faults import FaultKind, Verb
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated
from tests.support.sync import SETTINGS

OWNER = Owner(3, "0123456789abcdef")
BUFFERS = [b"a" * 50, b"b" * 40, b"c" * 30]
SIZE = 120


@simulated
async def test_names_are_never_used_twice(clock: SimulatedClock) -> None:
    """The sequence goes on within an epoch and begins anew in the next."""
    sender = ObjectSender(MemoryStore(clock).client(), "vm1", SETTINGS, clock)
    names = [
        sender.name(OWNER),
        sender.name(OWNER),
        sender.name(Owner(4, OWNER.incarnation)),
        sender.name(OWNER),
    ]
    assert [(name.epoch, name.seq) for name in names] == [(3, 1), (3, 2), (4, 1), (3, 1)]


@simulated
async def test_an_object_is_sent_until_it_is_there(clock: SimulatedClock) -> None:
    """Refusals, lost answers and late arrivals; afterwards the trouble is over, and the window smaller."""
    store = MemoryStore(clock)
    sender = ObjectSender(store.client(), "vm1", SETTINGS, clock)
    before = sender.window.limit
    store.inject(FaultKind.SLOW_DOWN, Verb.PUT_IF, times=3)
    store.inject(FaultKind.LATE, Verb.PUT_IF, delay_s=0.01)
    store.inject(FaultKind.FAIL, Verb.GET)
    name = sender.name(OWNER)
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(sender.send(name, BUFFERS, SIZE))
        await asyncio.sleep(0.02)
        assert sender.trouble is not None
        await sending
    assert store.snapshot() == {name.key: b"".join(BUFFERS)}
    assert sender.trouble is None
    assert sender.window.limit < before
    assert (sender.sent_objects, sender.sent_bytes) == (1, SIZE)


@simulated
async def test_a_key_that_holds_something_else_is_a_bug(clock: SimulatedClock) -> None:
    store = MemoryStore(clock)
    sender = ObjectSender(store.client(), "vm1", SETTINGS, clock)
    for other in (b"".join(BUFFERS)[:-1] + b"x", b"".join(BUFFERS) + b"x"):
        name = sender.name(OWNER)
        store.place(name.key, other)
        with pytest.raises(InvariantError):
            await sender.send(name, BUFFERS, SIZE)


@simulated
async def test_a_reason_to_stop_is_asked_for_before_each_attempt(clock: SimulatedClock) -> None:
    store = MemoryStore(clock)
    sender = ObjectSender(store.client(), "vm1", SETTINGS, clock)
    store.offline = True
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 4:
            raise CapacityError("enough")

    with pytest.raises(CapacityError):
        await sender.send(sender.name(OWNER), BUFFERS, SIZE, check)
    assert len(store.log) == 3


@simulated
async def test_the_window_makes_callers_wait_in_turn(clock: SimulatedClock) -> None:
    settings = attrs.evolve(SETTINGS, segment_size=4096, window=8192)
    sender = ObjectSender(MemoryStore(clock).client(), "vm1", settings, clock)
    entered: list[int] = []

    async def enter(number: int) -> None:
        await sender.enter(4096)
        entered.append(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(enter(number))
        await asyncio.sleep(1)
        assert len(entered) == 2
        sender.leave(4096)
        await asyncio.sleep(1)
        assert len(entered) == 3
        sender.leave(4096)
    assert sorted(entered) == [0, 1, 2, 3]


@simulated
async def test_a_slow_link_has_time_for_a_large_object(clock: SimulatedClock) -> None:
    """The limit of a request grows with its size."""
    store = MemoryStore(clock, timeout_s=1000)
    sender = ObjectSender(store.client(), "vm1", SETTINGS, clock)
    large = b"x" * (32 << 20)
    store.inject(FaultKind.DELAY, Verb.PUT_IF, delay_s=120)
    await sender.send(sender.name(OWNER), [large], len(large))
    assert len(store.log) == 1
