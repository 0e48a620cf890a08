"""The daemon in this process: what it opens, what it takes in, what it answers, and how it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from silo import Host, MemoryDevice
from silo.clock import SystemClock
from silo.config import GroupConfig, IncomingConfig, ServeConfig, SyncConfig, VolumeConfig
from silo.control import ControlClient, Result
from silo.daemon import serve_until_told
from silo.errors import InvalidRequestError, MigrationAborted, SiloError
from silo.exports.nbd_client import NbdClient
from silo.hosted import HostedGroup
from silo.sync.memory_store import MemoryStore

MIB = 1 << 20
SIZE = 4 * MIB
CONTENT = SystemClock().token(MIB)


class Daemon:
    """`serve_until_told` as a task, stopped by a signal as any other."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.events: list[dict[str, Any]] = []
        self._ready = asyncio.Event()

    def say(self, event: dict[str, Any], text: str) -> None:
        assert text
        self.events.append(event)
        if event["event"] == "ready":
            self._ready.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[ControlClient]:
        """A connection to it, until the block is left: then SIGTERM, and an orderly end."""
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            served = tasks.create_task(serve_until_told(self.config, self.say))
            ready = tasks.create_task(self._ready.wait())
            await asyncio.wait((served, ready), return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if not served.done():
                try:
                    async with ControlClient(Path(self.config.state) / "control.sock") as client:
                        yield client
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)


def one_volume(path: Path, name: str) -> GroupConfig:
    """A group on one disk."""
    return GroupConfig(volumes={"disk": VolumeConfig(path=str(path / f"{name}.img"), size=SIZE)})


def one_disk(path: Path, name: str) -> ServeConfig:
    """A daemon with the group vm1 on one disk."""
    return ServeConfig(
        state=str(path / name),
        store=f"file://{path}/store",
        listen=f"unix:{path}/{name}-nbd.sock",
        peer=f"unix:{path}/{name}.sock",
        sync=SyncConfig(interval="1h"),
        groups={"vm1": one_volume(path, name)},
    )


def waiting(path: Path, name: str) -> ServeConfig:
    """A daemon that only takes groups in."""
    return ServeConfig(
        state=str(path / name),
        store=f"file://{path}/store",
        listen=f"unix:{path}/{name}-{{group}}.sock",
        peer=f"unix:{path}/{name}.sock",
        sync=SyncConfig(interval="1h"),
    )


async def group_status(client: ControlClient, name: str) -> dict[str, Any] | None:
    """What the daemon says of one group."""
    groups = (await client.call("status"))["groups"]
    return next((group for group in groups if group["name"] == name), None)


@contextlib.asynccontextmanager
async def foreign_host(path: Path, name: str = "vm1", size: int = SIZE) -> AsyncIterator[HostedGroup]:
    """Another host with a group of that name and the same store."""
    async with Host(path / "foreign") as host:
        store = f"file://{path}/store"
        group = await host.open_group(name, {"disk": MemoryDevice(size)}, store=store)
        await group.volumes["disk"].write(0, CONTENT)
        yield group


async def test_it_serves_syncs_and_stores_what_is_left_when_told_to_stop(tmp_path: Path) -> None:
    """SIGTERM: the last writes are in the store, and the events say what happened."""
    daemon = Daemon(one_disk(tmp_path, "a"))
    async with daemon.running() as client:
        async with await NbdClient.connect(f"unix:{tmp_path}/a-nbd.sock") as guest:
            await guest.write(0, CONTENT)
        assert await client.call("sync", group="vm1") == {"generation": 1}
        async with await NbdClient.connect(f"unix:{tmp_path}/a-nbd.sock") as guest:
            await guest.write(2 * MIB, b"last words")
        heat = await client.call("heat", group="vm1", cells=16)
        assert len(heat["volumes"][0]["reads"]) == 16
    assert [event["event"] for event in daemon.events] == ["ready", "stopping", "stopped"]
    async with Host(tmp_path / "other") as host:
        group = await host.open_group("vm1", {"disk": MemoryDevice(SIZE)}, store=f"file://{tmp_path}/store")
        assert bytes(await group.volumes["disk"].read(0, MIB)) == CONTENT
        assert bytes(await group.volumes["disk"].read(2 * MIB, 10)) == b"last words"


async def test_verbs_answer_nonsense_with_errors(tmp_path: Path) -> None:
    """Whatever a client sends, the daemon lives on and says what was wrong."""
    async with Daemon(one_disk(tmp_path, "a")).running() as client:
        for verb, args in (
            ("sync", {"group": "vm2"}),
            ("sync", {"group": []}),
            ("sync", {}),
            ("heat", {"group": "vm1", "cells": 0}),
            ("heat", {"group": "vm1", "cells": "many"}),
            ("migrate", {"group": "vm1", "to": "nowhere"}),
            ("migrate", {"group": "vm1", "to": f"unix:{tmp_path}/a.sock", "deadline_s": [1]}),
            ("wait", {"group": "vm1", "timeout_s": {}}),
            ("dance", {}),
        ):
            with pytest.raises(SiloError) as caught:
                await client.call(verb, **args)
            assert str(caught.value)
        assert (await group_status(client, "vm1") or {})["state"] == "running"


async def test_there_and_back_again_over_restarts(tmp_path: Path) -> None:
    """A configured group that comes back is found, after a restart, where the configuration says that it is."""
    store = f"file://{tmp_path}/store"
    async with Host(tmp_path / "b", listen=f"unix:{tmp_path}/b.sock") as b:
        async with Daemon(one_disk(tmp_path, "a")).running() as on_a, asyncio.TaskGroup() as tasks:
            async with await NbdClient.connect(f"unix:{tmp_path}/a-nbd.sock") as guest:
                await guest.write(0, CONTENT)
            migration = tasks.create_task(on_a.call("migrate", group="vm1", to=f"unix:{tmp_path}/b.sock"))
            offer = await anext(b.offers())
            group = await offer.accept({"disk": MemoryDevice(SIZE)}, store=store)
            assert (await migration)["outcome"] == "released"
            assert await group_status(on_a, "vm1") is None
            await group.volumes["disk"].write(MIB, b"written on b")
            await group.wait_hydrated()
            async with group.migrate(f"unix:{tmp_path}/a.sock") as move:
                await move.wait_released()
            while not (await on_a.call("wait", group="vm1", timeout_s=5))["hydrated"]:
                pass
        async with (
            Daemon(one_disk(tmp_path, "a")).running(),
            await NbdClient.connect(f"unix:{tmp_path}/a-nbd.sock") as guest,
        ):
            assert bytes(await guest.read(0, MIB)) == CONTENT
            assert bytes(await guest.read(MIB, 12)) == b"written on b"


async def test_an_arrived_group_is_reopened_after_a_restart(tmp_path: Path) -> None:
    """Although no configuration names it."""
    async with Daemon(waiting(tmp_path, "b")).running() as on_b:
        async with foreign_host(tmp_path) as group, group.migrate(f"unix:{tmp_path}/b.sock") as move:
            await move.wait_released()
        await on_b.call("wait", group="vm1", timeout_s=10)
    async with (
        Daemon(waiting(tmp_path, "b")).running() as on_b,
        await NbdClient.connect(f"unix:{tmp_path}/b-vm1.sock") as guest,
    ):
        assert bytes(await guest.read(0, MIB)) == CONTENT
        assert (await group_status(on_b, "vm1") or {})["state"] == "running"


async def test_an_offer_cannot_touch_a_group_that_runs_here(tmp_path: Path, expect_log) -> None:
    """Neither its service nor its disk, whatever size the offer has."""
    expect_log("vm1 .* was refused")
    async with Daemon(waiting(tmp_path, "b")).running() as on_b:
        async with foreign_host(tmp_path) as group, group.migrate(f"unix:{tmp_path}/b.sock") as move:
            await move.wait_released()
        disk = tmp_path / "b" / "incoming" / "vm1" / "disk.img"
        inode = disk.stat().st_ino
        for size in (SIZE, 2 * SIZE):
            async with Host(tmp_path / f"liar-{size}") as host:
                liar = await host.open_group("vm1", {"disk": MemoryDevice(size)})
                with pytest.raises(MigrationAborted, match="open already"):
                    async with liar.migrate(f"unix:{tmp_path}/b.sock") as move:
                        await move.wait_released()
        assert disk.stat().st_ino == inode
        async with await NbdClient.connect(f"unix:{tmp_path}/b-vm1.sock") as guest:
            assert bytes(await guest.read(0, MIB)) == CONTENT
        assert (await group_status(on_b, "vm1") or {})["volumes"][0]["size"] == SIZE


async def test_names_of_an_offer_never_reach_the_file_system(tmp_path: Path) -> None:
    """An offer whose volume is named like a path is refused before any path is made of it."""
    (tmp_path / "precious.img").write_bytes(b"precious")
    async with Daemon(waiting(tmp_path, "b")).running(), foreign_host(tmp_path) as group:
        volume = group.volumes.pop("disk")
        volume.name = "../../../precious"
        group.volumes[volume.name] = volume
        with pytest.raises(MigrationAborted, match="cannot name a volume"):
            async with group.migrate(f"unix:{tmp_path}/b.sock") as move:
                await move.wait_released()
        volume.name = "disk"
        group.volumes["disk"] = group.volumes.pop("../../../precious")
    assert (tmp_path / "precious.img").read_bytes() == b"precious"


async def test_a_host_without_room_refuses_and_lives_on(tmp_path: Path, expect_log) -> None:
    """The directory for arrivals cannot be made."""
    expect_log("vm1 .* was refused")
    (tmp_path / "file").write_bytes(b"")
    config = waiting(tmp_path, "b")
    config = ServeConfig(
        state=config.state, store=config.store, peer=config.peer,
        incoming=IncomingConfig(directory=str(tmp_path / "file")),
    )  # fmt: skip
    async with Daemon(config).running() as on_b, foreign_host(tmp_path) as group:
        with pytest.raises(MigrationAborted, match="no room"):
            async with group.migrate(f"unix:{tmp_path}/b.sock") as move:
                await move.wait_released()
        assert (await on_b.call("status"))["groups"] == []
        assert group.phase == "running"


async def test_a_host_that_accepts_nothing_says_so(tmp_path: Path) -> None:
    """``incoming.accept = false``."""
    config = ServeConfig(
        state=str(tmp_path / "b"), peer=f"unix:{tmp_path}/b.sock", incoming=IncomingConfig(accept=False)
    )
    async with Daemon(config).running(), foreign_host(tmp_path) as group:
        with pytest.raises(MigrationAborted, match="accepts no groups"):
            async with group.migrate(f"unix:{tmp_path}/b.sock") as move:
                await move.wait_released()


async def test_a_disk_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """The error says which volume of which group."""
    (tmp_path / "a.img").write_bytes(bytes(MIB))
    with pytest.raises(InvalidRequestError, match="vm1/disk"):
        await serve_until_told(one_disk(tmp_path, "a"), lambda event, text: None)


async def test_a_caller_that_leaves_aborts_before_the_guest_was_stopped(tmp_path: Path) -> None:
    """The control connection closes while nobody has accepted the offer yet; the group stays and syncs."""
    async with (
        Daemon(one_disk(tmp_path, "a")).running() as on_a,
        Host(tmp_path / "b", listen=f"unix:{tmp_path}/b.sock") as b,
    ):
        async with ControlClient(tmp_path / "a" / "control.sock") as caller:
            async for line in caller.stream("migrate", group="vm1", to=f"unix:{tmp_path}/b.sock"):
                assert not isinstance(line, Result)
                break
            assert (await anext(b.offers())).group == "vm1"
        while (await group_status(on_a, "vm1") or {})["state"] != "running":
            await asyncio.sleep(0.02)
        async with await NbdClient.connect(f"unix:{tmp_path}/a-nbd.sock") as guest:
            await guest.write(0, CONTENT)
        assert await on_a.call("sync", group="vm1") == {"generation": 1}


async def test_a_second_signal_skips_the_storing(tmp_path: Path, monkeypatch, expect_log) -> None:
    """All groups are closed, none is stored; the next start has everything, and stores it."""
    store = MemoryStore(SystemClock())
    monkeypatch.setattr("silo.host.open_store", lambda url, clock: store.client())
    names = ("x", "y")
    config = ServeConfig(
        state=str(tmp_path / "a"), store="s3://bucket/prefix", listen=f"unix:{tmp_path}/a.sock",
        sync=SyncConfig(interval="1h"), groups={name: one_volume(tmp_path, name) for name in names},
    )  # fmt: skip
    daemon = Daemon(config)
    async with daemon.running():
        for name in names:
            uri = f"nbd+unix:///{name}/disk?socket={tmp_path}/a.sock"
            async with await NbdClient.connect(uri) as guest:
                await guest.write(0, CONTENT)
        store.offline = True
        os.kill(os.getpid(), signal.SIGTERM)
        while not any(event["event"] == "stopping" for event in daemon.events):
            await asyncio.sleep(0.02)
    assert daemon.events[-1]["event"] == "stopped"
    store.offline = False
    async with Daemon(config).running() as client:
        for name in names:
            assert await client.call("sync", group=name) == {"generation": 1}
    for name in names:
        assert (tmp_path / f"{name}.img").read_bytes()[:MIB] == CONTENT


async def test_a_group_hibernates_in_one_daemon_and_wakes_in_another(tmp_path: Path, expect_log) -> None:
    """Neither a start of the first nor of the second opens it by itself; and its disk is in the arrivals then."""
    daemon = Daemon(one_disk(tmp_path, "a"))
    async with daemon.running() as on_a:
        async with await NbdClient.connect(f"unix:{tmp_path}/a-nbd.sock") as guest:
            await guest.write(0, CONTENT)
        lines = [line async for line in on_a.stream("hibernate", group="vm1")]
        assert isinstance(lines[-1], Result)
        report = lines[-1].value
        assert report["outcome"] == "stored"
        assert lines[0]["phase"] == "storing"
        assert await group_status(on_a, "vm1") is None
        with pytest.raises(InvalidRequestError, match="no group"):
            await on_a.call("hibernate", group="vm1")
    expect_log("vm1 is hibernated")
    async with Daemon(one_disk(tmp_path, "a")).running() as on_a:
        assert await group_status(on_a, "vm1") is None
    async with Daemon(waiting(tmp_path, "b")).running() as on_b:
        answer = await on_b.call("resume", group="vm1")
        assert answer["uris"] == [f"nbd+unix:///vm1/disk?socket={tmp_path}/b-vm1.sock"]
        async with await NbdClient.connect(f"unix:{tmp_path}/b-vm1.sock") as guest:
            assert bytes(await guest.read(0, MIB)) == CONTENT
            await guest.write(2 * MIB, b"awake")
        with pytest.raises(InvalidRequestError, match="open here already"):
            await on_b.call("resume", group="vm1")
    async with Daemon(waiting(tmp_path, "b")).running() as on_b:
        assert (await group_status(on_b, "vm1") or {})["state"] == "running"
        async with await NbdClient.connect(f"unix:{tmp_path}/b-vm1.sock") as guest:
            assert bytes(await guest.read(2 * MIB, 5)) == b"awake"
        await on_b.call("hibernate", group="vm1", deadline_s=30)
    async with Daemon(one_disk(tmp_path, "a")).running() as on_a:
        await on_a.call("resume", group="vm1")
        async with await NbdClient.connect(f"unix:{tmp_path}/a-nbd.sock") as guest:
            assert bytes(await guest.read(2 * MIB, 5)) == b"awake"
        with pytest.raises(InvalidRequestError):
            await on_a.call("resume", group="vm2")
