"""A target that is kept close behind, until it is told to take over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from silo import Host, MemoryDevice, SyncSettings
from silo.arriving import Arrival
from silo.clock import SystemClock
from silo.errors import MigrationAborted
from silo.events import Phase, PhaseEntered
from silo.hosted import HostedGroup
from silo.moving import Move
from silo.p2p.settings import MigrationPolicy, MigrationSettings
from silo.sync.memory_store import MemoryStore

MIB = 1 << 20
SIZE = 8 * MIB
LAZY = SyncSettings(rpo_s=3600)
OFTEN = MigrationSettings(follow_s=0.05, switch_size=0, progress_s=0.05)
FOLLOW = MigrationPolicy(follow=True)
CONTENT = SystemClock().token(SIZE)


async def until_following(move: Move) -> None:
    """Until the target is close for the first time."""
    async for event in move.events():
        if isinstance(event, PhaseEntered) and event.phase is Phase.FOLLOWING:
            return


async def until_equal(one: HostedGroup, other: HostedGroup) -> None:
    """Until what was written last here is on the other host's device; the test brings the deadline."""
    there = other.volumes["disk"].device
    while bytes(await one.volumes["disk"].read(0, SIZE)) != bytes(await there.read(0, SIZE)):
        await asyncio.sleep(0.01)


async def _next(host: Host) -> Arrival:
    return await anext(host.offers())


@pytest.mark.parametrize("with_store", [True, False])
async def test_a_standby_has_little_left_to_take(tmp_path: Path, *, with_store: bool) -> None:
    """What is written arrives round by round; at the switchover almost nothing is left to send."""
    store, url = MemoryStore(SystemClock()) if with_store else None, f"unix:{tmp_path}/b.sock"
    async with (
        Host(tmp_path / "b", listen=url) as b,
        Host(tmp_path / "a", migration=OFTEN) as a,
        asyncio.TaskGroup() as tasks,
    ):
        client = store.client() if store else None
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=client, sync=LAZY)
        disk = group.volumes["disk"]
        await disk.write(0, CONTENT)
        offers = tasks.create_task(_next(b))
        async with group.migrate(url, policy=FOLLOW) as move:
            offer = await offers
            client = store.client() if store else None
            there = await offer.accept({"disk": MemoryDevice(SIZE)}, store=client, sync=LAZY)
            await until_following(move)
            for turn in range(5):
                await disk.write(turn * MIB, b"turn %d" % turn)
                await until_equal(group, there)
                assert move.phase is Phase.FOLLOWING
                assert there.phase == "arriving"
            move.switch(deadline=a.clock.monotonic() + 30)
            move.switch()
            report = await move.wait_released()
        await there.wait_running()
        expected = bytearray(CONTENT)
        for turn in range(5):
            expected[turn * MIB : turn * MIB + 6] = b"turn %d" % turn
        assert bytes(await there.volumes["disk"].read(0, SIZE)) == expected
    phases = {timing.phase: timing.duration_s for timing in report.phases}
    assert Phase.FOLLOWING in phases
    assert report.duration_s == pytest.approx(sum(timing.duration_s for timing in report.phases))
    assert report.bytes_peer <= SIZE + 10 * 64 * 1024


async def test_a_standby_that_is_not_wanted_any_more_is_let_go(tmp_path: Path) -> None:
    """Or that goes away: the group runs on as if nobody had followed, and may be followed again."""
    url = f"unix:{tmp_path}/b.sock"
    async with (
        Host(tmp_path / "b", listen=url) as b,
        Host(tmp_path / "a", migration=OFTEN) as a,
        asyncio.TaskGroup() as tasks,
    ):
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)})
        for _ in range(2):
            offers = tasks.create_task(_next(b))
            async with group.migrate(url, policy=FOLLOW) as move:
                there = await (await offers).accept({"disk": MemoryDevice(SIZE)})
                await until_following(move)
                await group.volumes["disk"].write(0, b"on it goes")
                move.abort("never mind")
                with pytest.raises(MigrationAborted):
                    await move.wait_released()
            with pytest.raises(MigrationAborted):
                await there.wait_running()
            while b.groups:
                await asyncio.sleep(0.01)
            assert group.phase == "running"
