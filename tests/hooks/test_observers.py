"""Observers see everything in order, and stop a migration by raising while it can be stopped."""

from __future__ import annotations

import asyncio
import threading

import pytest

from silo.errors import MigrationAborted, MigrationError
from silo.events import LinkChanged, MigrationEvent, Phase, PhaseEntered, Progress
from silo.hooks.observers import OBSERVER_TIMEOUT_S, Observers
from silo.p2p.ports import Consent, Emit
from silo.testing.loop import SimulatedClock, explore, run_simulated

SWITCH = PhaseEntered(group="vm1", at=9.0, phase=Phase.SWITCHOVER)
LINK_UP = LinkChanged(group="vm1", at=1.0, up=True)
LINK_DOWN = LinkChanged(group="vm1", at=2.0, up=False)


def progress(at: float) -> Progress:
    return Progress(
        group="vm1",
        at=at,
        phase=Phase.PRE_COPY,
        bytes_peer=0,
        rate_bps=0.0,
        exposed_bytes=0,
        remaining_bytes=0,
        eta_s=None,
    )


def test_they_are_what_a_migration_asks_for(clock):
    """Both ports are satisfied."""
    observers = Observers([], clock, group="vm1")
    emit: Emit = observers.emit
    consent: Consent = observers.consent
    assert callable(emit)
    assert callable(consent)


async def test_both_kinds_of_observers_see_everything_in_order(clock):
    """What was emitted before comes before what they are asked."""
    seen: dict[str, list[MigrationEvent]] = {"awaited": [], "plain": []}

    async def awaited(event: MigrationEvent) -> None:
        seen["awaited"].append(event)

    def plain(event: MigrationEvent) -> None:
        assert threading.current_thread() is not threading.main_thread()
        seen["plain"].append(event)

    observers = Observers([awaited, plain], clock, group="vm1")
    observers.emit(LINK_UP)
    observers.emit(LINK_DOWN)
    await observers.consent(SWITCH)
    observers.emit(LINK_UP)
    await observers.drain()
    assert list(seen.values()) == [[LINK_UP, LINK_DOWN, SWITCH, LINK_UP]] * 2


def test_events_are_delivered_as_they_happen():
    """While `run` runs, nobody has to ask."""

    async def scenario(clock: SimulatedClock) -> None:
        seen: asyncio.Queue[MigrationEvent] = asyncio.Queue()
        observers = Observers([seen.put], clock, group="vm1")
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(observers.run())
            for event in (LINK_UP, LINK_DOWN):
                observers.emit(event)
                assert await seen.get() == event
            await observers.consent(SWITCH)
            assert seen.get_nowait() == SWITCH
            running.cancel()

    explore(scenario, seeds=range(20))


async def test_nobody_objects(clock):
    """Without observers there is nobody to ask, and nothing to keep."""
    observers = Observers([], clock, group="vm1")
    observers.emit(LINK_UP)
    await observers.consent(SWITCH)
    await observers.drain()


@pytest.mark.parametrize("error", [MigrationAborted("not now", hint="on Sunday"), ValueError("not now")])
async def test_a_veto(clock, error):
    """The objection says who and why; the other observers have heard the question, too."""
    seen = []

    def curfew(event: MigrationEvent) -> None:
        raise error

    observers = Observers([curfew, seen.append], clock, group="vm1")
    with pytest.raises(MigrationError, match=r"observer .*curfew of the migration of vm1 failed: not now"):
        await observers.consent(SWITCH)
    assert seen == [SWITCH]


async def test_an_early_veto(clock):
    """An observer that says no at any time before is heard when it matters."""

    async def watchful(event: MigrationEvent) -> None:
        if event is LINK_DOWN:
            raise MigrationAborted("the link is bad")

    observers = Observers([watchful], clock, group="vm1")
    observers.emit(LINK_DOWN)
    observers.emit(LINK_UP)
    await observers.drain()
    with pytest.raises(MigrationError, match="the link is bad"):
        await observers.consent(SWITCH)


async def test_an_accident_is_no_veto(clock, expect_log):
    """An observer with a bug is reported, and does not keep the group on a dying host."""
    expect_log(r"observer .*broken of the migration of vm1 failed: 'key' \(event LinkChanged\)")

    def broken(event: MigrationEvent) -> None:
        if event is LINK_UP:
            raise KeyError("key")

    observers = Observers([broken], clock, group="vm1")
    observers.emit(LINK_UP)
    await observers.consent(SWITCH)


def test_silence_is_no_consent():
    """An observer that does not answer in time has not agreed; the others do not wait for it one by one."""

    async def scenario(clock: SimulatedClock) -> None:
        async def silent(event: MigrationEvent) -> None:
            await asyncio.get_running_loop().create_future()

        observers = Observers([silent, silent], clock, group="vm1")
        asked_at = clock.monotonic()
        with pytest.raises(MigrationError, match=r"observer .*silent .* was not done by its deadline"):
            await observers.consent(SWITCH)
        assert clock.monotonic() - asked_at == OBSERVER_TIMEOUT_S

    run_simulated(scenario, seed=1)


def test_progress_gives_way_to_newer_progress():
    """A slow observer gets the latest, and misses nothing of any other kind."""

    async def scenario(clock: SimulatedClock) -> None:
        seen: list[MigrationEvent] = []

        async def observer(event: MigrationEvent) -> None:
            seen.append(event)

        observers = Observers([observer], clock, group="vm1")
        for at in range(3):
            observers.emit(progress(at))
        observers.emit(LINK_UP)
        for at in range(3, 6):
            observers.emit(progress(at))
        await observers.drain()
        assert seen == [progress(2), LINK_UP, progress(5)]

    run_simulated(scenario, seed=1)


def test_a_cancelled_question_leaves_nothing_behind():
    """The observers are interrupted, and can be asked again."""

    async def scenario(clock: SimulatedClock) -> None:
        asked = asyncio.Event()
        answers = [asyncio.get_running_loop().create_future(), None]

        async def observer(event: MigrationEvent) -> None:
            asked.set()
            if (answer := answers.pop(0)) is not None:
                await answer

        observers = Observers([observer], clock, group="vm1")
        async with asyncio.TaskGroup() as tasks:
            question = tasks.create_task(observers.consent(SWITCH))
            await asked.wait()
            question.cancel()
        assert question.cancelled()
        await observers.consent(SWITCH)
        assert answers == []

    explore(scenario, seeds=range(10))
