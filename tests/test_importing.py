"""Imports on a host: served at once, never committed half, and resumed whatever happened."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from silo import FileDevice, Host, SyncSettings
from silo.chunkmap import Residency
from silo.clock import SystemClock
from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.memory import MemoryDevice
from silo.errors import CorruptionError, InvalidRequestError, UnavailableError
from silo.exports.nbd_exports import NbdExport, NbdExports
from silo.exports.nbd_server import NbdServer
from silo.hosted import HostedGroup
from silo.importing import IMPORT_RECORD, import_to_file, plan_imports
from silo.opening import VolumeSpec
from silo.statedir import StateDir
from tests.support.volumes import make_volume

MIB = 1 << 20
SIZE = 4 * MIB
CHUNK = 64 * 1024
LAZY = SyncSettings(rpo_s=3600)
QUICK = SyncSettings(rpo_s=0.05)


class Remote:
    """A server with one disk, half of it zeros, which goes away and returns."""

    def __init__(self, path: Path, size: int = SIZE) -> None:
        self.content = SystemClock().token(size // 2) + bytes(size - size // 2)
        self.device = FaultyDevice(MemoryDevice(size))
        _, self.volume = make_volume(self.device)
        self.uri = f"nbd+unix:///disk?socket={path}/remote.sock"
        self._where = f"unix:{path}/remote.sock"

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[NbdServer]:
        await self.volume.write(0, self.content[: len(self.content) // 2])
        await self.volume.zero(len(self.content) // 2, len(self.content) // 2)
        exports = NbdExports()
        exports.add(NbdExport("disk", self.volume))
        async with asyncio.TaskGroup() as tasks:
            server = NbdServer(exports, tasks)
            server.listen(self._where)
            try:
                yield server
            finally:
                await server.aclose()


def disk(path: Path, remote: Remote, size: int = SIZE, **options: object) -> dict[str, VolumeSpec]:
    return {"disk": VolumeSpec(FileDevice(path / "disk.img", size), import_from=remote.uri, **options)}


async def opened_without_server(
    path: Path, remote: Remote, host: Host, store: str, sync: SyncSettings = LAZY
) -> HostedGroup:
    """A group whose server went away right after the group was opened."""
    async with remote.serving():
        return await host.open_group("vm1", disk(path, remote), store=store, sync=sync)


async def has_record(path: Path) -> bool:
    state = StateDir(path / "state")
    try:
        return await state.has_record("vm1", IMPORT_RECORD)
    finally:
        await state.aclose()


async def test_it_is_served_while_it_comes(tmp_path: Path) -> None:
    """Reads wait for the server and no write does that covers its chunks; when all is here it is stored as a whole."""
    remote, store = Remote(tmp_path), f"file://{tmp_path}/store"
    expected = bytearray(remote.content)
    async with Host(tmp_path / "state") as host:
        group = await opened_without_server(tmp_path, remote, host, store, QUICK)
        volume = group.volumes["disk"]
        assert group.phase == "importing"
        assert not group.is_hydrated
        await volume.write(3 * CHUNK, b"w" * CHUNK)
        expected[3 * CHUNK : 4 * CHUNK] = b"w" * CHUNK
        with pytest.raises(InvalidRequestError, match="importing"):
            group.migrate("unix:/nowhere")
        async with asyncio.TaskGroup() as tasks:
            read = tasks.create_task(volume.read(0, 100))
            partial = tasks.create_task(volume.write(10 * CHUNK + 5, b"partial"))
            await asyncio.sleep(0)
            status = group.status()
            assert status["importing"]["from"] == {"disk": remote.uri}
            assert status["sync"]["holds"] == ["import"]
            assert status["sync"]["generation"] == 0
            async with remote.serving():
                assert bytes(await read) == remote.content[:100]
                await partial
                await group.wait_hydrated()
        expected[10 * CHUNK + 5 : 10 * CHUNK + 12] = b"partial"
        assert (group.phase, group.status()["importing"]) == ("running", None)
        assert bytes(await volume.read(0, SIZE)) == expected
        assert await group.sync_now() == 1
    async with Host(tmp_path / "elsewhere") as host:
        copy = FileDevice(tmp_path / "copy.img", SIZE)
        group = await host.open_group("vm1", {"disk": copy}, store=store, sync=LAZY)
        assert bytes(await group.volumes["disk"].read(0, SIZE)) == expected


async def test_nothing_is_committed_before_everything_is_here(tmp_path: Path) -> None:
    """However long it takes, whatever is asked for, and when the host is closed in the middle."""
    remote, store = Remote(tmp_path), f"file://{tmp_path}/store"
    async with Host(tmp_path / "state") as host:
        group = await opened_without_server(tmp_path, remote, host, store, QUICK)
        await group.volumes["disk"].write(0, b"early" * CHUNK)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await group.sync_now()
        assert group.status()["sync"]["generation"] == 0
    assert await has_record(tmp_path)
    async with Host(tmp_path / "state") as host, remote.serving():
        group = await host.open_group("vm1", disk(tmp_path, remote), store=store, sync=LAZY)
        await group.wait_hydrated()
        expected = b"early" * CHUNK + remote.content[5 * CHUNK :]
        assert bytes(await group.volumes["disk"].read(0, SIZE)) == expected
        assert await group.sync_now() == 1
    assert not await has_record(tmp_path)


async def test_power_loss_takes_back_only_what_can_be_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After another boot only the checkpoint counts: what was fetched and not flushed is fetched again."""
    remote, store = Remote(tmp_path), f"file://{tmp_path}/store"
    async with Host(tmp_path / "state") as host:
        group = await opened_without_server(tmp_path, remote, host, store)
        volume = group.volumes["disk"]
        await volume.write(CHUNK, b"f" * CHUNK)
        await volume.flush()
        # As a kill: whatever leaving would make durable is lost.
        monkeypatch.setattr(type(group.group), "checkpoint", _nothing)
        assert volume.chunks.count_residency()[Residency.ABSENT_PEER] == SIZE // CHUNK - 1
        for chunk in (2, 3):
            volume.fill_nowait(chunk, remote.content[chunk * CHUNK : (chunk + 1) * CHUNK])
    monkeypatch.undo()
    monkeypatch.setattr("silo.statedir.boot_id", lambda: "another boot")
    async with Host(tmp_path / "state") as host:
        group = await host.open_group(
            "vm1", {"disk": FileDevice(tmp_path / "disk.img")}, store=store, sync=LAZY
        )
        volume = group.volumes["disk"]
        assert group.phase == "importing"
        assert volume.chunks.count_residency()[Residency.ABSENT_PEER] == SIZE // CHUNK - 1
        async with remote.serving():
            await group.wait_hydrated()
        expected = remote.content[:CHUNK] + b"f" * CHUNK + remote.content[2 * CHUNK :]
        assert bytes(await volume.read(0, SIZE)) == expected


async def _nothing(self: object) -> None:
    """In place of the checkpoint that an orderly end makes."""


async def test_the_record_goes_only_after_everything_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power loss would make chunks absent again, with nothing left that says where they come from."""
    remote = Remote(tmp_path)
    order: list[str] = []
    async with Host(tmp_path / "state") as host, remote.serving():
        group = await host.open_group("vm1", disk(tmp_path, remote))
        flush, delete = group.group.flush, group.state.delete_record

        async def flushed() -> None:
            assert not group.group.absent_counts((Residency.ABSENT_PEER,))
            await flush()
            order.append("flush")

        async def deleted(name: str) -> None:
            order.append(name)
            await delete(name)

        monkeypatch.setattr(group.group, "flush", flushed)
        monkeypatch.setattr(group.state, "delete_record", deleted)
        await group.wait_hydrated()
    assert order == ["flush", IMPORT_RECORD]


async def test_a_disk_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not forgotten: the last flush must succeed before the import is over."""
    remote = Remote(tmp_path)
    async with Host(tmp_path / "state") as host, remote.serving():
        group = await host.open_group("vm1", disk(tmp_path, remote))
        flush, failures = group.group.flush, [UnavailableError("the disk is sick")]

        async def flushed() -> None:
            if failures:
                raise failures.pop()
            await flush()

        monkeypatch.setattr(group.group, "flush", flushed)
        work = group.importing
        await group.wait_hydrated()
        assert not failures
        assert work is not None
        assert work.error == ""


async def test_another_address_for_the_same_disk_is_taken(tmp_path: Path) -> None:
    """The server may move; what was fetched stays."""
    (tmp_path / "new").mkdir()
    remote, store = Remote(tmp_path), f"file://{tmp_path}/store"
    async with Host(tmp_path / "state") as host:
        await opened_without_server(tmp_path, remote, host, store)
    moved = Remote(tmp_path / "new")
    moved.content = remote.content
    async with Host(tmp_path / "state") as host, moved.serving():
        group = await host.open_group("vm1", disk(tmp_path, moved), store=store, sync=LAZY)
        await group.wait_hydrated()
        assert bytes(await group.volumes["disk"].read(0, SIZE)) == remote.content
    async with Host(tmp_path / "state") as host:
        group = await host.open_group("vm1", disk(tmp_path, moved), store=store, sync=LAZY)
        assert group.phase == "running", "it came here long ago, and its server is not asked any more"


async def test_what_makes_no_sense_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Another size, a device with content, no server, no URI."""
    remote = Remote(tmp_path)
    (tmp_path / "full.img").write_bytes(b"x" * SIZE)
    async with Host(tmp_path / "state") as host:
        with pytest.raises(UnavailableError):
            await host.open_group("vm1", disk(tmp_path, remote))
        async with remote.serving():
            larger = VolumeSpec(FileDevice(tmp_path / "larger.img", 2 * SIZE), import_from=remote.uri)
            with pytest.raises(InvalidRequestError, match="the same size"):
                await host.open_group("vm1", {"disk": larger})
            full = VolumeSpec(FileDevice(tmp_path / "full.img"), import_from=remote.uri)
            with pytest.raises(InvalidRequestError, match="has content"):
                await host.open_group("vm1", {"disk": full})
            (tmp_path / "other.img").touch()
            wrong = VolumeSpec(FileDevice(tmp_path / "other.img", SIZE), import_from="http://host/disk")
            with pytest.raises(InvalidRequestError, match="NBD server"):
                await host.open_group("vm1", {"disk": wrong})
            assert not await has_record_open(host)
            again = VolumeSpec(FileDevice(tmp_path / "full.img"), import_from=remote.uri, overwrite=True)
            group = await host.open_group("vm1", {"disk": again})
            await group.wait_hydrated()
            assert bytes(await group.volumes["disk"].read(0, SIZE)) == remote.content


async def has_record_open(host: Host) -> bool:
    """Of the group vm1, while the host has the state directory."""
    return await host._running_state().has_record("vm1", IMPORT_RECORD)


async def test_only_a_new_group_begins_with_an_import(tmp_path: Path) -> None:
    """One that is added later would hold up the commits of the others, so that is refused; so is leaving one out."""
    remote = Remote(tmp_path)
    plain = {"boot": VolumeSpec(FileDevice(tmp_path / "boot.img", SIZE))}
    async with Host(tmp_path / "state") as host:
        group = await host.open_group("vm1", plain)
        await host.close_group(group)
        async with remote.serving():
            with pytest.raises(InvalidRequestError, match="new group only"):
                await host.open_group(
                    "vm1", {"boot": FileDevice(tmp_path / "boot.img"), **disk(tmp_path, remote)}
                )
        async with remote.serving():
            (tmp_path / "disk2.img").touch()
            both = {
                "swap": VolumeSpec(FileDevice(tmp_path / "swap.img", SIZE)),
                "disk": VolumeSpec(FileDevice(tmp_path / "disk2.img", SIZE), import_from=remote.uri),
            }
            group = await host.open_group("vm2", both)
        await host.close_group(group)
        with pytest.raises(InvalidRequestError, match="disk is missing"):
            await host.open_group("vm2", {"swap": FileDevice(tmp_path / "swap.img")})
        again = {
            name: FileDevice(tmp_path / file) for name, file in (("swap", "swap.img"), ("disk", "disk2.img"))
        }
        group = await host.open_group("vm2", again)
        async with remote.serving():
            await group.wait_hydrated()
        assert bytes(await group.volumes["disk"].read(0, SIZE)) == remote.content


async def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    """Never skipped: without it absent chunks could not be had."""
    directory = StateDir(tmp_path / "state")
    try:
        state = await directory.open_group("vm1")
        specs = {"disk": SimpleNamespace(import_from="")}
        for content in (b"", b"{}", b'{"volumes": {"disk": 5}}', b'{"volumes": {}, "format": 9}'):
            await state.write_record(IMPORT_RECORD, content)
            with pytest.raises(CorruptionError):
                await plan_imports(state, specs, generation=0)  # type: ignore[arg-type]
    finally:
        await directory.aclose()


async def test_a_whole_disk_into_a_file(tmp_path: Path) -> None:
    """With its holes, and nothing left behind when it fails."""
    remote = Remote(tmp_path)
    seen: list[int] = []
    to = tmp_path / "copy.img"
    async with remote.serving():
        found = await import_to_file(remote.uri, to, lambda done, total: seen.append(done))
    assert found == {"size": SIZE, "fetched_bytes": SIZE // 2}
    assert to.read_bytes() == remote.content
    assert to.stat().st_blocks * 512 <= SIZE // 2 + CHUNK
    assert seen == sorted(seen)
    with pytest.raises(UnavailableError):
        await import_to_file(remote.uri, tmp_path / "none.img", lambda done, total: None)
    assert not (tmp_path / "none.img").exists()


async def test_an_import_into_a_file_gives_up_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script must not wait for ever for a server that is gone."""
    remote = Remote(tmp_path)
    monkeypatch.setattr("silo.importing.PATIENCE_S", 0.3)
    monkeypatch.setattr("silo.importing.TELL_S", 0.05)
    async with remote.serving():
        remote.device.fail(Verb.READ, for_ever=True)
        with pytest.raises(UnavailableError):
            await import_to_file(remote.uri, tmp_path / "copy.img", lambda done, total: None)
    assert not (tmp_path / "copy.img").exists()
