"""Groups that are opened with the records of a migration beside them, and whose disks are known elsewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from silo import FileDevice, Host, MemoryDevice, SyncSettings
from silo.clock import SystemClock
from silo.errors import FencedError, InvalidRequestError, UnavailableError
from silo.hosted import HostedGroup
from silo.opening import VolumeSpec
from silo.p2p.handover import Mark
from silo.p2p.messages import VolumeOffer
from silo.p2p.records import HandoverRecord, OfferRecord, encode_record
from silo.p2p.terms import Terms
from silo.sync.claim import Expectation
from silo.sync.memory_store import MemoryStore
from silo.sync.register import Register

MIB = 1 << 20
SIZE = 4 * MIB
LAZY = SyncSettings(rpo_s=3600)
ID = bytes(16)


async def open_disk(host: Host, path: Path, store: MemoryStore | None, **options) -> HostedGroup:
    """The group vm1 on a file."""
    client = store.client() if store else None
    return await host.open_group("vm1", {"disk": FileDevice(path, SIZE)}, store=client, sync=LAZY, **options)


def offer_record(mark: Mark, epoch: int, incarnation: str, generation: int = 0) -> bytes:
    """The record of a source."""
    return encode_record(
        OfferRecord(
            mark=mark, migration=ID, group="vm1", target_url="unix:/nowhere/at/all.sock", target_host="other",
            terms=Terms(epoch=epoch, incarnation=incarnation, generations=(generation,), nonce="theirs"),
            reclaim_nonce="ours",
            volumes=(VolumeOffer(name="disk", size=SIZE, chunk_size=65536, block_size=4096, used=0),),
        )
    )  # fmt: skip


async def leave_offer(host: Host, path: Path, store: MemoryStore, mark: Mark = Mark.OFFERED) -> None:
    """Die right after having offered the group, with content that is stored and content that is not."""
    group = await open_disk(host, path, store)
    await group.volumes["disk"].write(0, b"stored")
    await group.sync_now()
    await group.volumes["disk"].write(MIB, b"only here")
    assert group.link is not None
    owner = group.link.register.owner
    assert owner is not None
    record = offer_record(mark, owner.epoch, owner.incarnation, 1)
    await group.state.write_record("offer", record)
    await host.close_group(group, drain=False)


@pytest.mark.parametrize("with_store", [True, False])
@pytest.mark.parametrize("told", [True, False])
async def test_an_evacuated_group_opens_again(tmp_path: Path, *, with_store: bool, told: bool) -> None:
    """Its source may be gone for ever without having understood: the group is ours all the same."""
    store = MemoryStore(SystemClock()) if with_store else None
    async with asyncio.timeout(30):
        async with Host(tmp_path / "state") as host:
            group = await open_disk(host, tmp_path / "disk.img", store)
            await group.volumes["disk"].write(0, b"evacuated")
            record = HandoverRecord(mark=Mark.EVACUATED, migration=ID, source_host="other", body=b"")
            if not told:
                await group.state.write_record("handover", encode_record(record))
        for _ in range(2):
            async with Host(tmp_path / "state") as host:
                group = await open_disk(host, tmp_path / "disk.img", store)
                await group.wait_running()
                assert bytes(await group.volumes["disk"].read(0, 9)) == b"evacuated"
                assert group.phase == "running"
                await group.wait_hydrated()
                if with_store:
                    await group.volumes["disk"].write(MIB, b"more")
                    assert await group.sync_now() >= 1


async def test_a_source_that_restarts_gets_its_group_back(tmp_path: Path) -> None:
    """Nobody has claimed it: everything is here, and is stored again; the offer is gone."""
    store = MemoryStore(SystemClock())
    async with asyncio.timeout(30):
        async with Host(tmp_path / "state") as host:
            await leave_offer(host, tmp_path / "disk.img", store)
        async with Host(tmp_path / "state") as host:
            group = await open_disk(host, tmp_path / "disk.img", store)
            await group.wait_running()
            assert bytes(await group.volumes["disk"].read(MIB, 9)) == b"only here"
            assert await group.sync_now() == 2
            assert not await group.state.record_names()
            assert group.status()["sync"]["holds"] == []


async def test_a_source_that_restarts_without_the_store_waits(tmp_path: Path) -> None:
    """Whether the group is ours, only the register knows: nothing is served before it has answered."""
    store = MemoryStore(SystemClock())
    async with asyncio.timeout(30), Host(tmp_path / "state") as host:
        await leave_offer(host, tmp_path / "disk.img", store)
        store.offline = True
        with pytest.raises(UnavailableError):
            await open_disk(host, tmp_path / "disk.img", store)
        store.offline = False
        group = await open_disk(host, tmp_path / "disk.img", store)
        await group.wait_running()
        assert bytes(await group.volumes["disk"].read(MIB, 9)) == b"only here"


async def test_a_source_that_restarts_after_the_claim_only_serves_chunks(tmp_path: Path) -> None:
    """Its gate stays closed, and closing it stores nothing over what the target has."""
    store = MemoryStore(SystemClock())
    clock = SystemClock()
    async with asyncio.timeout(30), Host(tmp_path / "state") as host:
        await leave_offer(host, tmp_path / "disk.img", store)
        target = Register(store.client(), "vm1", clock)
        await target.claim(Expectation.force(), nonce="theirs")
        group = await open_disk(host, tmp_path / "disk.img", store)
        assert group.move is not None
        async for event in group.move.events():
            if event.as_dict().get("phase") == "post-copy":
                break
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await group.volumes["disk"].read(0, 1)
        await host.close_group(group, drain=False)
        head = await target.read()
        assert head is not None
        assert (head.epoch, head.generation) == (2, 1)


async def test_a_source_that_restarts_after_a_third_party_took_the_group_is_fenced(tmp_path: Path) -> None:
    """It keeps its data, and whoever reads gets an error."""
    store = MemoryStore(SystemClock())
    async with asyncio.timeout(30), Host(tmp_path / "state") as host:
        await leave_offer(host, tmp_path / "disk.img", store)
        await Register(store.client(), "vm1", SystemClock()).claim(Expectation.force(), nonce="a third party")
        group = await open_disk(host, tmp_path / "disk.img", store)
        with pytest.raises(FencedError):
            await group.wait_running()
        with pytest.raises(FencedError):
            await group.volumes["disk"].read(0, 1)
        await host.close_group(group)
    assert (tmp_path / "disk.img").read_bytes()[MIB : MIB + 9] == b"only here"


async def test_a_group_that_left_for_good_is_forgotten_at_last(tmp_path: Path) -> None:
    """The process died after the target had everything, while it was forgetting."""
    store = MemoryStore(SystemClock())
    async with asyncio.timeout(30), Host(tmp_path / "state") as host:
        await leave_offer(host, tmp_path / "disk.img", store, Mark.RELEASED)
        await Register(store.client(), "vm1", SystemClock()).claim(Expectation.force(), nonce="theirs")
        with pytest.raises(FencedError):
            await open_disk(host, tmp_path / "disk.img", store)
        assert await host.known_volumes("vm1") == {}


async def test_a_damaged_record_keeps_a_group_closed(tmp_path: Path) -> None:
    """Nobody guesses what it said, and the device is free again."""
    async with asyncio.timeout(30), Host(tmp_path / "state") as host:
        await host.close_group(await open_disk(host, tmp_path / "disk.img", None))
        record = tmp_path / "state" / "groups" / "vm1" / "records" / "handover"
        record.write_bytes(b"nonsense")
        for _ in range(2):
            with pytest.raises(Exception, match="handover"):
                await open_disk(host, tmp_path / "disk.img", None)
        record.unlink()
        await open_disk(host, tmp_path / "disk.img", None)


async def test_volumes_of_different_chunk_sizes_are_restored_as_they_are(tmp_path: Path) -> None:
    """Nobody needs to say again how they are divided; saying it wrongly is an error."""
    store = MemoryStore(SystemClock())
    names = {"disk": 65536, "swap.1": 16384}
    async with asyncio.timeout(30):
        async with Host(tmp_path / "a") as host:
            specs = {name: VolumeSpec(MemoryDevice(SIZE), size) for name, size in names.items()}
            group = await host.open_group("vm.1", specs, store=store.client(), sync=LAZY)
            for name in names:
                await group.volumes[name].write(MIB, name.encode())
        async with Host(tmp_path / "b") as host:
            devices = {name: MemoryDevice(SIZE) for name in names}
            group = await host.open_group("vm.1", devices, store=store.client(), sync=LAZY)
            for name, size in names.items():
                assert group.volumes[name].geometry.chunk_size == size
                assert bytes(await group.volumes[name].read(MIB, len(name))) == name.encode()
        async with Host(tmp_path / "c") as host:
            wrong = {name: VolumeSpec(MemoryDevice(SIZE), 4096) for name in names}
            with pytest.raises(InvalidRequestError, match="chunks"):
                await host.open_group("vm.1", wrong, store=store.client(), sync=LAZY)
