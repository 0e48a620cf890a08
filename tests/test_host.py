"""A host from outside: groups opened, exported, stored, restored, refused and closed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import attrs
import pytest

from silo import FileDevice, Host, MemoryDevice, SyncSettings
from silo.clock import SystemClock
from silo.errors import ClosedError, FencedError, InvalidRequestError, UnavailableError
from silo.exports.nbd_client import NbdClient
from silo.opening import VolumeSpec
from silo.sync.memory_store import MemoryStore
from silo.sync.settings import RetrySettings

MIB = 1 << 20
SIZE = 8 * MIB
QUICK = SyncSettings(rpo_s=0.05)
LAZY = SyncSettings(rpo_s=3600)


def fill(path: Path, size: int = SIZE) -> bytes:
    """A disk with content in its first half."""
    content = SystemClock().token(size // 2) + bytes(size // 2)
    path.write_bytes(content[: size // 2])
    with path.open("r+b") as file:
        file.truncate(size)
    return content


async def test_a_guest_reads_and_writes_through_an_export(tmp_path: Path) -> None:
    """What was on the disk is read, what is written ends up there, and the store has both after leaving."""
    content = fill(tmp_path / "disk.img")
    store = f"file://{tmp_path}/store"
    async with Host(tmp_path / "state") as host:
        group = await host.open_group(
            "vm1", {"disk": FileDevice(tmp_path / "disk.img")}, store=store, sync=LAZY
        )
        nbd = await host.export(group, f"unix:{tmp_path}/nbd.sock")
        async with await NbdClient.connect(nbd.uri("disk")) as client:
            assert bytes(await client.read(MIB, 4096)) == content[MIB : MIB + 4096]
            await client.write(5 * MIB, b"new" * 1000)
            await client.flush()
    expected = content[: 5 * MIB] + b"new" * 1000 + content[5 * MIB + 3000 :]
    assert (tmp_path / "disk.img").read_bytes() == expected
    async with Host(tmp_path / "elsewhere") as host:
        copy = FileDevice(tmp_path / "copy.img", SIZE)
        group = await host.open_group("vm1", {"disk": copy}, store=store, sync=LAZY)
        assert bytes(await group.volumes["disk"].read(5 * MIB, 3000)) == b"new" * 1000
        await group.wait_hydrated()
        assert group.is_hydrated
    assert (tmp_path / "copy.img").read_bytes() == expected


async def test_a_group_without_a_store_is_served_from_its_disk(tmp_path: Path) -> None:
    """And reopened; asking for the store is an error that says so."""
    content = fill(tmp_path / "disk.img")
    for _ in range(2):
        async with Host(tmp_path / "state") as host:
            group = await host.open_group("vm1", {"disk": FileDevice(tmp_path / "disk.img")})
            assert bytes(await group.volumes["disk"].read(0, SIZE)) == content
            with pytest.raises(InvalidRequestError, match="no store"):
                await group.sync_now()


async def test_a_store_added_later_gets_everything(tmp_path: Path) -> None:
    """Content that was written before there was a store is stored, too."""
    content = fill(tmp_path / "disk.img")
    async with Host(tmp_path / "state") as host:
        group = await host.open_group("vm1", {"disk": FileDevice(tmp_path / "disk.img")})
        await group.volumes["disk"].write(6 * MIB, b"early")
    store = f"file://{tmp_path}/store"
    async with Host(tmp_path / "state") as host:
        await host.open_group("vm1", {"disk": FileDevice(tmp_path / "disk.img")}, store=store)
    async with Host(tmp_path / "other") as host:
        group = await host.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store)
        expected = content[: 6 * MIB] + b"early" + content[6 * MIB + 5 :]
        assert bytes(await group.volumes["disk"].read(0, SIZE)) == expected


async def test_reopening_uploads_nothing_again(tmp_path: Path) -> None:
    """The map says what is stored; only what changed since is sent."""
    fill(tmp_path / "disk.img")
    store = f"file://{tmp_path}/store"
    async with Host(tmp_path / "state") as host:
        await host.open_group("vm1", {"disk": FileDevice(tmp_path / "disk.img")}, store=store)
    async with Host(tmp_path / "state") as host:
        group = await host.open_group(
            "vm1", {"disk": FileDevice(tmp_path / "disk.img")}, store=store, sync=LAZY
        )
        assert group.group.exposed_bytes == 0
        await group.volumes["disk"].write(0, b"x")
        await group.sync_now()
        sync = group.status()["sync"]
        assert sync["sent_bytes"] < 200_000
        assert sync["generation"] == 2


async def test_a_second_owner_is_refused_and_a_forced_one_fences_the_first(
    tmp_path: Path, expect_log
) -> None:
    """Without the assertion nothing happens; with it the old owner's guest gets errors."""
    expect_log("belongs to another writer")
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "a") as first, Host(tmp_path / "b") as second:
        group = await first.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        await group.volumes["disk"].write(0, b"kept")
        await group.sync_now()
        with pytest.raises(FencedError):
            await second.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        taken = await second.open_group(
            "vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY, host_is_dead=True
        )
        assert bytes(await taken.volumes["disk"].read(0, 4)) == b"kept"
        await group.volumes["disk"].write(0, b"lost")
        with pytest.raises(FencedError):
            await group.sync_now()
        with pytest.raises(FencedError):
            await group.volumes["disk"].write(0, b"more")


async def test_leaving_without_the_store_says_what_is_not_stored(tmp_path: Path, expect_log) -> None:
    """The error has the number of bytes, everything is closed, and the next start stores it."""
    store = MemoryStore(SystemClock())
    disk = tmp_path / "disk.img"
    impatient = SyncSettings(rpo_s=3600, drain_timeout_s=0.2)
    with pytest.raises(UnavailableError, match="65536 bytes"):
        async with Host(tmp_path / "state") as host:
            group = await host.open_group(
                "vm1", {"disk": FileDevice(disk, SIZE)}, store=store.client(), sync=impatient
            )
            await group.volumes["disk"].write(0, b"late")
            store.offline = True
    store.offline = False
    async with Host(tmp_path / "state") as host:
        await host.open_group("vm1", {"disk": FileDevice(disk)}, store=store.client(), sync=LAZY)
    async with Host(tmp_path / "other") as host:
        group = await host.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        assert bytes(await group.volumes["disk"].read(0, 4)) == b"late"


async def test_a_device_with_content_is_not_overwritten_by_a_restore(tmp_path: Path) -> None:
    """Unless that is said."""
    content = fill(tmp_path / "disk.img")
    store = f"file://{tmp_path}/store"
    async with Host(tmp_path / "state") as host:
        await host.open_group("vm1", {"disk": FileDevice(tmp_path / "disk.img")}, store=store)
    fill(tmp_path / "precious.img")
    precious = (tmp_path / "precious.img").read_bytes()
    async with Host(tmp_path / "other") as host:
        with pytest.raises(InvalidRequestError, match="overwrite"):
            await host.open_group("vm1", {"disk": FileDevice(tmp_path / "precious.img")}, store=store)
        assert (tmp_path / "precious.img").read_bytes() == precious
        spec = VolumeSpec(FileDevice(tmp_path / "precious.img"), overwrite=True)
        group = await host.open_group("vm1", {"disk": spec}, store=store)
        assert bytes(await group.volumes["disk"].read(0, SIZE)) == content


async def test_one_state_directory_has_one_owner(tmp_path: Path) -> None:
    """Two hosts on one state directory do not open the same group."""
    async with Host(tmp_path / "state") as first, Host(tmp_path / "state") as second:
        await first.open_group("vm1", {"disk": MemoryDevice(SIZE)})
        with pytest.raises(UnavailableError):
            await second.open_group("vm1", {"disk": MemoryDevice(SIZE)})
        with pytest.raises(InvalidRequestError, match="open already"):
            await first.open_group("vm1", {"disk": MemoryDevice(SIZE)})


async def test_a_group_kept_in_one_store_is_not_opened_with_another(tmp_path: Path) -> None:
    """Nor without any."""
    disk = tmp_path / "disk.img"
    async with Host(tmp_path / "state") as host:
        await host.open_group("vm1", {"disk": FileDevice(disk, SIZE)}, store=f"file://{tmp_path}/store")
        await host.close_group(host.groups["vm1"])
        for other in (f"file://{tmp_path}/other", None):
            with pytest.raises(InvalidRequestError, match="is kept in"):
                await host.open_group("vm1", {"disk": FileDevice(disk)}, store=other)


async def test_refused_devices_are_closed(tmp_path: Path) -> None:
    """A failed opening leaves no lock behind, so that it can be tried again."""
    disk = tmp_path / "disk.img"
    async with Host(tmp_path / "state") as host:
        with pytest.raises(InvalidRequestError):
            await host.open_group("../vm1", {"disk": FileDevice(disk, SIZE)})
        with pytest.raises(InvalidRequestError):
            await host.open_group("vm1", {})
        await host.open_group("vm1", {"disk": FileDevice(disk)})


async def test_a_host_that_is_not_running_says_so(tmp_path: Path) -> None:
    """Before it was entered and after it was left."""
    host = Host(tmp_path / "state")
    with pytest.raises(ClosedError):
        await host.open_group("vm1", {"disk": MemoryDevice(SIZE)})
    async with host:
        pass
    with pytest.raises(ClosedError):
        await host.open_group("vm1", {"disk": MemoryDevice(SIZE)})


async def test_steady_sync_keeps_up(tmp_path: Path) -> None:
    """Without being asked, the store gets what is written."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "state") as host:
        group = await host.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=QUICK)
        for number in range(3):
            await group.volumes["disk"].write(number * MIB, b"content")
            await group.wait_stored()
        assert group.status()["sync"]["generation"] >= 3
        assert group.group.exposed_bytes == 0


async def test_status_and_heat_tell_the_truth(tmp_path: Path) -> None:
    """Sizes by residency add up, and the hottest cell has heat 1."""
    fill(tmp_path / "disk.img")
    async with Host(tmp_path / "state") as host:
        group = await host.open_group("vm1", {"disk": FileDevice(tmp_path / "disk.img")})
        for _ in range(3):
            await group.volumes["disk"].read(MIB, 4096)
        disk = group.status()["volumes"][0]
        assert disk["present"] + disk["zero"] == disk["size"] == SIZE
        assert disk["present"] == SIZE // 2
        picture = group.heat(16)[0]
        assert len(picture["reads"]) == len(picture["residency"]) == 16
        assert picture["reads"].index(max(picture["reads"])) == 2
        assert picture["residency"][0] == "PRESENT"
        assert picture["residency"][-1] == "ZERO"


async def test_a_store_that_becomes_a_file_is_an_alarm_and_no_end(tmp_path: Path) -> None:
    """The guest goes on, the status says what is wrong, and everything is stored once somebody has mended it."""
    fill(tmp_path / "disk.img")
    store = tmp_path / "store"
    impatient = attrs.evolve(QUICK, retry=RetrySettings(refused_delay_s=0.05))
    async with Host(tmp_path / "state") as host:
        group = await host.open_group(
            "vm1", {"disk": FileDevice(tmp_path / "disk.img")}, store=f"file://{store}", sync=impatient
        )
        await group.sync_now()
        store.rename(tmp_path / "aside")
        store.write_text("not a directory")
        await group.volumes["disk"].write(0, b"while it is a file")
        while not group.status()["sync"]["last_error"]:
            await asyncio.sleep(0.01)
        assert bytes(await group.volumes["disk"].read(0, 18)) == b"while it is a file"
        store.unlink()
        (tmp_path / "aside").rename(store)
        assert await group.sync_now() > 1
        assert not group.status()["sync"]["last_error"]


async def test_a_flush_of_any_connection_covers_the_writes_of_all(tmp_path: Path) -> None:
    """With ``flush="store"`` it returns when the store has them; without a store, or in two ways, it is refused."""
    store = MemoryStore(SystemClock())
    async with Host(tmp_path / "state") as host:
        group = await host.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=store.client(), sync=LAZY)
        nbd = await host.export(group, f"unix:{tmp_path}/nbd.sock", flush="store")
        async with (
            await NbdClient.connect(nbd.uri("disk")) as one,
            await NbdClient.connect(nbd.uri("disk")) as other,
        ):
            assert one.export.description == "flushes are durable in the store"
            for number in range(3):
                await one.write(number * 4096, b"new" * 100)
                await other.flush()
                assert group.group.exposed_bytes == 0
            await one.write(5 * MIB, b"fua" * 100, fua=True)
            assert group.group.exposed_bytes == 0
        await host.export(group, f"unix:{tmp_path}/more.sock", flush="store")
        with pytest.raises(InvalidRequestError, match="same flush"):
            await host.export(group, f"unix:{tmp_path}/other.sock")
        with pytest.raises(InvalidRequestError, match="local or store"):
            await host.export(group, f"unix:{tmp_path}/other.sock", flush="peer")
        alone = await host.open_group("vm2", {"disk": MemoryDevice(SIZE)})
        with pytest.raises(InvalidRequestError, match="it has none"):
            await host.export(alone, f"unix:{tmp_path}/other.sock", flush="store")
