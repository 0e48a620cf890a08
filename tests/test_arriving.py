"""Groups that arrive: what a host takes in, what it refuses to give up, and what it says while it is away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from silo import FileDevice, Host, MemoryDevice, SyncSettings
from silo.clock import SystemClock
from silo.errors import InvalidRequestError, MigrationAborted, SiloError
from silo.hosted import HostedGroup
from silo.opening import VolumeSpec
from silo.p2p.channel import LinkRefused, dial
from silo.p2p.handover import Mark
from silo.p2p.messages import PROTOCOL_VERSIONS, Hello, Lane, Reason, Stage
from silo.p2p.records import HandoverRecord, encode_record
from silo.p2p.settings import MigrationSettings
from silo.p2p.transport import PlainTransport
from silo.sync.memory_store import MemoryStore

MIB = 1 << 20
SIZE = 4 * MIB
LAZY = SyncSettings(rpo_s=3600)


async def refused(group: HostedGroup, url: str, reason: str) -> None:
    """A migration that comes to nothing, for this reason."""
    with pytest.raises(MigrationAborted, match=reason):
        async with group.migrate(url) as move:
            await move.wait_released()
    assert group.phase == "running"


async def test_what_is_only_here_is_not_given_up_for_an_offer(tmp_path: Path) -> None:
    """This host owns the group, has not stored everything, and does not run it just now: an offer must be a mistake."""
    store, other = MemoryStore(SystemClock()), MemoryStore(SystemClock())
    disk, url = tmp_path / "disk.img", f"unix:{tmp_path}/b.sock"
    async with asyncio.timeout(30), Host(tmp_path / "b", listen=url) as b, Host(tmp_path / "a") as a:
        group = await b.open_group("vm1", {"disk": FileDevice(disk, SIZE)}, store=store.client(), sync=LAZY)
        await group.volumes["disk"].write(0, b"only here")
        await b.close_group(group, drain=False)
        impostor = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=other.client(), sync=LAZY)

        async def accept(reason: str, kind: MemoryStore | None) -> None:
            offer = await anext(b.offers())
            with pytest.raises(InvalidRequestError, match=reason):
                client = kind.client() if kind else None
                await offer.accept({"disk": FileDevice(disk, SIZE)}, store=client, sync=LAZY)

        for reason, kind in (("belongs to this host", store), ("no store can say", None)):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(accept(reason, kind))
                await refused(impostor, url, reason)
        group = await b.open_group("vm1", {"disk": FileDevice(disk)}, store=store.client(), sync=LAZY)
        assert bytes(await group.volumes["disk"].read(0, 9)) == b"only here"
        assert await group.sync_now() == 1


async def test_two_offers_of_one_group(tmp_path: Path) -> None:
    """The first that is accepted arrives; the second is told why not."""
    store, url = MemoryStore(SystemClock()), f"unix:{tmp_path}/b.sock"
    async with (
        asyncio.timeout(30), Host(tmp_path / "b", listen=url) as b,
        Host(tmp_path / "a") as a, Host(tmp_path / "c") as c,
    ):  # fmt: skip
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        twin = await c.open_group("vm1", {"disk": MemoryDevice(SIZE)})
        offers = b.offers()
        async with asyncio.TaskGroup() as tasks:
            second = tasks.create_task(refused(twin, url, "open already|lock|holds"))
            other = await anext(offers)
            async with group.migrate(url) as move:
                offer = await anext(offers)
                arrived = await offer.accept({"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
                with pytest.raises(SiloError):
                    await other.accept({"disk": MemoryDevice(SIZE)})
                await move.wait_released()
            await second
        assert b.groups == {"vm1": arrived}
        assert arrived.phase == "running"


async def test_read_only_volumes_stay_read_only(tmp_path: Path) -> None:
    """What the accepting program says of them holds for the guest, and not for the migration."""
    url = f"unix:{tmp_path}/b.sock"
    async with asyncio.timeout(30), Host(tmp_path / "b", listen=url) as b, Host(tmp_path / "a") as a:
        base = tmp_path / "base.img"
        base.write_bytes(b"base" * (SIZE // 4))
        group = await a.open_group("vm1", {"base": VolumeSpec(FileDevice(base), read_only=True)})
        async with group.migrate(url) as move:
            offer = await anext(b.offers())
            group = await offer.accept({"base": VolumeSpec(MemoryDevice(SIZE), read_only=True)})
            await move.wait_released()
        await group.wait_hydrated()
        assert bytes(await group.volumes["base"].read(MIB, 4)) == b"base"
        with pytest.raises(InvalidRequestError):
            await group.volumes["base"].write(0, b"x")


async def test_a_lazily_restored_group_moves_on_while_it_hydrates(tmp_path: Path) -> None:
    """What it never had itself comes from the store at its next host, too."""
    store, url = MemoryStore(SystemClock()), f"unix:{tmp_path}/c.sock"
    content = SystemClock().token(SIZE)
    async with asyncio.timeout(40):
        async with Host(tmp_path / "a") as a:
            group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
            await group.volumes["disk"].write(0, content)
        async with Host(tmp_path / "b") as b, Host(tmp_path / "c", listen=url) as c:
            group = await b.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
            assert not group.is_hydrated
            await group.volumes["disk"].write(100, b"newer")
            async with group.migrate(url) as move:
                offer = await anext(c.offers())
                group = await offer.accept({"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
                await move.wait_released()
            expected = content[:100] + b"newer" + content[105:]
            assert bytes(await group.volumes["disk"].read(0, SIZE)) == expected


async def test_a_host_is_left_with_offers_that_nobody_answered(tmp_path: Path) -> None:
    """Leaving does not wait for their sources, and whoever waits for a group is told that it was closed."""
    url = f"unix:{tmp_path}/b.sock"
    async with asyncio.timeout(30), Host(tmp_path / "a") as a, asyncio.TaskGroup() as tasks:
        group = await a.open_group("vm1", {"disk": MemoryDevice(SIZE)})
        async with asyncio.timeout(5):
            async with Host(tmp_path / "b", listen=url) as b:
                move = group.migrate(url)
                move.begin()
                assert (await anext(b.offers())).group == "vm1"
        move.abort("enough")
        with pytest.raises(MigrationAborted):
            await move.wait_released()
        assert group.phase == "running"
        tasks.create_task(a.close_group(group))


@pytest.mark.parametrize(("kept", "reason"), [(True, Reason.BUSY), (False, Reason.UNKNOWN)])
async def test_what_is_on_disk_is_never_denied(tmp_path: Path, *, kept: bool, reason: Reason) -> None:
    """A host with the record of a handover does not say that it knows nothing, although it has not opened the group.

    Without a store the source would run the guest on, and so would this host after its next start.
    """
    url = f"unix:{tmp_path}/b.sock"
    hello = Hello(
        oldest=PROTOCOL_VERSIONS[0], newest=PROTOCOL_VERSIONS[1], host="a", group="vm1", migration=bytes(16),
        link=1, lane=Lane.BULK, stage=Stage.HANDED,
    )  # fmt: skip
    async with asyncio.timeout(30), Host(tmp_path / "b", listen=url) as b:
        group = await b.open_group("vm1", {"disk": MemoryDevice(SIZE)})
        if kept:
            record = HandoverRecord(mark=Mark.HANDED, migration=bytes(16), source_host="a", body=b"")
            await group.state.write_record("handover", encode_record(record))
        await b.close_group(group)
        with pytest.raises(LinkRefused) as caught:
            await dial(PlainTransport(), url, hello, SystemClock(), MigrationSettings())
        assert caught.value.refusal.reason is reason
