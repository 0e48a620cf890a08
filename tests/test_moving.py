"""A migration as the program that asked for it sees it: its events, its end, and ending it early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silo import Host, MemoryDevice, SyncSettings
from silo.clock import SystemClock
from silo.errors import MigrationAborted, SiloError
from silo.events import Phase, PhaseEntered
from silo.hosted import HostedGroup
from silo.moving import EventLog
from silo.sync.memory_store import MemoryStore

SIZE = 1 << 20
LAZY = SyncSettings(rpo_s=3600)


def entered(phase: Phase) -> PhaseEntered:
    """An event."""
    return PhaseEntered(group="vm1", at=0.0, phase=phase)


async def test_every_reader_gets_everything_from_the_beginning() -> None:
    """Also one that comes when it is over."""
    log = EventLog("vm1", SystemClock())
    async with asyncio.timeout(10):
        log.emit(entered(Phase.CONNECTING))
        reader = log.read()
        assert (await anext(reader)).as_dict()["phase"] == "connecting"
        log.emit(entered(Phase.PRE_COPY))
        await log.end()
        assert [event.as_dict()["phase"] async for event in reader] == ["pre-copy"]
        assert [event.as_dict()["phase"] async for event in log.read()] == ["connecting", "pre-copy"]
        assert log.phase is Phase.PRE_COPY


async def arrive(host: Host, store: MemoryStore) -> HostedGroup:
    """Take in the next group that is offered."""
    offer = await anext(host.offers())
    return await offer.accept({"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)


@pytest.mark.parametrize("phase", [Phase.CONNECTING, Phase.PRE_COPY, Phase.SWITCHOVER, Phase.POST_COPY])
async def test_aborted_in_any_phase_the_group_is_on_one_host(tmp_path: Path, phase: Phase) -> None:
    """However late the word comes, twice even, exactly one host runs the group and can store it."""
    store, url = MemoryStore(SystemClock()), f"unix:{tmp_path}/b.sock"
    async with asyncio.timeout(40), Host(tmp_path / "b", listen=url) as b, Host(tmp_path / "a") as a:
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        await group.volumes["disk"].write(0, b"whoever has it")
        move = group.migrate(url, observers=[_when(phase, lambda: [move.abort("never mind") for _ in "ab"])])
        async with asyncio.TaskGroup() as tasks:
            arriving = tasks.create_task(arrive(b, store))
            move.begin()
            await move.wait_ended()
            arriving.cancel()
        if group.phase == "running":
            with pytest.raises(MigrationAborted):
                await move.wait_released()
            owner = group
            assert phase is not Phase.POST_COPY
        else:
            assert (await move.wait_released()).outcome is not None
            owner = arriving.result()
            await owner.wait_hydrated()
        assert bytes(await owner.volumes["disk"].read(0, 14)) == b"whoever has it"
        assert await owner.sync_now() == 1


@pytest.mark.parametrize("phase", [Phase.CONNECTING, Phase.PRE_COPY, Phase.SWITCHOVER, Phase.POST_COPY])
@pytest.mark.parametrize("drain", [True, False])
async def test_closed_in_any_phase_nothing_is_lost(tmp_path: Path, phase: Phase, *, drain: bool) -> None:
    """In peace or in haste; whichever host has the group then, its content is whole."""
    store, url = MemoryStore(SystemClock()), f"unix:{tmp_path}/b.sock"
    disk = MemoryDevice(SIZE)
    reached = asyncio.Event()
    async with asyncio.timeout(40), Host(tmp_path / "b", listen=url) as b:
        async with Host(tmp_path / "a") as a, asyncio.TaskGroup() as tasks:
            group = await a.open_group("vm1", {"disk": disk}, store=store.client(), sync=LAZY)
            await group.volumes["disk"].write(0, b"whoever has it")
            arriving = tasks.create_task(arrive(b, store))
            move = group.migrate(url, observers=[_when(phase, reached.set)])
            move.begin()
            await reached.wait()
            await a.close_group(group, drain=drain)
            assert group.phase == "closed"
            assert not a.groups
            arriving.cancel()
        if not drain:
            return  # the records on disk say how it goes on: see the tests of opening
        async with Host(tmp_path / "c") as c:
            try:
                owner = arriving.result()
                await owner.wait_running()
            except (asyncio.CancelledError, SiloError):  # it has not arrived, so it was stored and released
                owner = await c.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client())
            assert bytes(await owner.volumes["disk"].read(0, 14)) == b"whoever has it"


def _when(phase: Phase, act: Callable[[], Any]) -> Callable[[object], None]:
    """An observer that does something when a phase is entered."""

    def observe(event: object) -> None:
        if isinstance(event, PhaseEntered) and event.phase is phase:
            act()

    return observe
