"""Whose a group is after crashes, forced claims, and stores that forget: what a host opens, and what it refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from silo import FileDevice, Host, MemoryDevice, SyncSettings
from silo.clock import SystemClock
from silo.errors import CorruptionError, FencedError
from silo.hosted import HostedGroup
from silo.sync.memory_store import MemoryStore
from silo.sync.store_faults import Fault, FaultKind, Operation, Verb

SIZE = 1 << 20
HEAD = "vm1/head"
LAZY = SyncSettings(rpo_s=3600)


async def open_disk(host: Host, path: Path | None, store: MemoryStore, **options) -> HostedGroup:
    """The group vm1 on a file, or on memory that nobody will look for."""
    device = FileDevice(path, SIZE) if path else MemoryDevice(SIZE)
    return await host.open_group("vm1", {"disk": device}, store=store.client(), sync=LAZY, **options)


async def put_back(store: MemoryStore, head: bytes) -> None:
    """What an operator does who restores an older version of the head."""
    client = store.client()
    await client.delete([HEAD])
    assert await client.put_if(HEAD, [head], match=None)


async def claim_in_vain(host: Host, path: Path | None, store: MemoryStore, kind: FaultKind) -> None:
    """Open, and be given up while nobody knows whether the claim took effect."""
    put = store.inject(kind, Verb.PUT_IF, key=HEAD, times=None)

    def choose(operation: Operation) -> Fault | None:
        """From the claim on nobody learns what has become of it."""
        return Fault(FaultKind.FAIL) if operation.verb is Verb.GET and put.hits else None

    store.choose = choose
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await open_disk(host, path, store)
    assert put.hits
    store.choose = None
    store.rules.remove(put)


@pytest.mark.parametrize("kind", [FaultKind.FAIL, FaultKind.LOSE_RESPONSE])
@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_host_recognises_itself_after_claims_in_vain(
    tmp_path: Path, kind: FaultKind, attempts: int
) -> None:
    """Whichever of its claims took effect, or none: what it wrote is here, and is stored."""
    store = MemoryStore(SystemClock())
    disk = tmp_path / "disk.img"
    async with Host(tmp_path / "state") as host:
        group = await open_disk(host, disk, store)
        await group.volumes["disk"].write(0, b"only here")
        await host.close_group(group, drain=False)
        for _ in range(attempts):
            await claim_in_vain(host, disk, store, kind)
        group = await open_disk(host, disk, store)
        assert bytes(await group.volumes["disk"].read(0, 9)) == b"only here"
        assert await group.sync_now() == 1


@pytest.mark.parametrize("kind", [FaultKind.FAIL, FaultKind.LOSE_RESPONSE])
@pytest.mark.parametrize("exists", [True, False])
async def test_a_first_claim_in_vain_is_repeated(tmp_path: Path, kind: FaultKind, *, exists: bool) -> None:
    """Nothing of the group is here but the memory of an attempt: it may still be made, or opened if it was released."""
    store = MemoryStore(SystemClock())
    if exists:
        async with Host(tmp_path / "other") as other:
            group = await open_disk(other, None, store)
            await group.volumes["disk"].write(0, b"released")
    async with Host(tmp_path / "state") as host:
        await claim_in_vain(host, None, store, kind)
        group = await open_disk(host, None, store)
        assert bytes(await group.volumes["disk"].read(0, 8)) == (b"released" if exists else bytes(8))


@pytest.mark.parametrize("force", [False, True])
async def test_a_fenced_host_keeps_its_data_and_opens_it_no_more(
    tmp_path: Path, expect_log, *, force: bool
) -> None:
    """Not even by force: what it has continues no history. It says what can be done."""
    expect_log("belongs to another writer")
    store = MemoryStore(SystemClock())
    disk = tmp_path / "disk.img"
    async with Host(tmp_path / "a") as first:
        group = await open_disk(first, disk, store)
        await group.volumes["disk"].write(0, b"stored")
        await group.sync_now()
        async with Host(tmp_path / "b") as second:
            taken = await open_disk(second, None, store, host_is_dead=True)
            await group.volumes["disk"].write(0, b"unsaved")
            with pytest.raises(FencedError):
                await group.sync_now()
            assert group.status()["state"] == "fenced"
            await first.close_group(group)
            await taken.volumes["disk"].write(0, b"newer")
        with pytest.raises(FencedError, match="last written in epoch 1") as refused:
            await open_disk(first, disk, store, host_is_dead=force)
        assert "move" in (refused.value.hint or "")
        assert disk.read_bytes()[:7] == b"unsaved"
        identity = tmp_path / "a" / "groups" / "vm1"
        identity.rename(tmp_path / "kept")
        group = await open_disk(first, tmp_path / "new.img", store)
        assert bytes(await group.volumes["disk"].read(0, 5)) == b"newer"


async def test_a_refusal_says_what_else_can_be_done(tmp_path: Path) -> None:
    """A living owner is no reason to force anything."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "a") as first, Host(tmp_path / "b") as second:
        await open_disk(first, None, store)
        with pytest.raises(FencedError) as refused:
            await open_disk(second, None, store)
        assert "--host-is-dead" in (refused.value.hint or "")
        assert "move it from that host" in (refused.value.hint or "")


@pytest.mark.parametrize("lost", ["epoch", "generation"])
async def test_a_head_that_was_rolled_back_is_refused(tmp_path: Path, lost: str) -> None:
    """Somebody put an older version of it back: a host that has seen more builds nothing on it."""
    store = MemoryStore(SystemClock())
    disk = tmp_path / "disk.img"
    async with Host(tmp_path / "state") as host:
        group = await open_disk(host, disk, store)
        await group.volumes["disk"].write(0, b"old")
        await group.sync_now()
        old = store.snapshot()[HEAD]
        if lost == "epoch":
            await host.close_group(group)
            group = await open_disk(host, disk, store)
        await group.volumes["disk"].write(0, b"new")
        await group.sync_now()
        await host.close_group(group)
        newest = store.snapshot()[HEAD]
        await put_back(store, old)
        for force in (False, True):
            with pytest.raises(CorruptionError, match="rolled back"):
                await open_disk(host, disk, store, host_is_dead=force)
        await put_back(store, newest)
        group = await open_disk(host, disk, store)
        assert bytes(await group.volumes["disk"].read(0, 3)) == b"new"


async def test_a_head_that_is_rolled_back_under_a_writer(tmp_path: Path, expect_log) -> None:
    """Nothing is committed over it; the guest goes on, and everything is stored once the head is back."""
    expect_log("rolled back")
    store = MemoryStore(SystemClock())
    disk = tmp_path / "disk.img"
    async with Host(tmp_path / "state") as host:
        group = await open_disk(host, disk, store)
        await group.volumes["disk"].write(0, b"old")
        await host.close_group(group)
        old = store.snapshot()[HEAD]
        group = await open_disk(host, disk, store)
        newest = store.snapshot()[HEAD]
        await put_back(store, old)
        await group.volumes["disk"].write(0, b"new")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await group.sync_now()
        assert "rolled back" in group.status()["sync"]["last_error"]
        assert store.snapshot()[HEAD] == old
        assert bytes(await group.volumes["disk"].read(0, 3)) == b"new"
        await put_back(store, newest)
        assert await group.sync_now() == 2


async def test_a_lease_is_waited_for(tmp_path: Path) -> None:
    """Nobody asserts anything: a living owner keeps its group, a dead one loses it when its lease has ended."""
    store = MemoryStore(SystemClock())
    leased = SyncSettings(rpo_s=3600, lease_s=1)
    async with Host(tmp_path / "b") as second:
        async with Host(tmp_path / "a") as first:
            devices = {"disk": FileDevice(tmp_path / "disk.img", SIZE)}
            group = await first.open_group("vm1", devices, store=store.client(), sync=leased)
            await group.volumes["disk"].write(0, b"stored")
            await group.sync_now()
            with pytest.raises(FencedError, match="it has renewed its lease"):
                await open_disk(second, None, store, after_lease=True)
            assert bytes(await group.volumes["disk"].read(0, 6)) == b"stored"
            await first.close_group(group, drain=False)  # as if it had died
        group = await open_disk(second, None, store, after_lease=True)
        assert bytes(await group.volumes["disk"].read(0, 6)) == b"stored"
        async with Host(tmp_path / "a") as first:
            with pytest.raises(FencedError, match="last written in epoch 1"):
                await open_disk(first, tmp_path / "disk.img", store, after_lease=True)
