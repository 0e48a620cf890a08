"""Two real daemons, and ``kill -9`` at the awkward moments of a migration between them.

Whatever dies, the group ends on exactly one host with exactly the bytes that were written, and a daemon that was
killed goes on from its records when it is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest

from silo.clock import SystemClock
from silo.errors import SiloError
from silo.exports.nbd_client import NbdClient
from tests.support.daemons import START_TIMEOUT_S, Daemon

pytestmark = pytest.mark.crash

MIB = 1 << 20
SIZE = 48 * MIB


@attrs.frozen
class Pair:
    """Host A with a group, host B, and what the disk must hold."""

    a: Daemon
    b: Daemon
    peer: str
    content: bytes


@contextlib.asynccontextmanager
async def two_hosts(path: Path, *, other_store: bool = False) -> AsyncIterator[Pair]:
    """A group on A: half of it stored, half of it only there."""
    content = SystemClock().token(SIZE)
    (path / "disk.img").write_bytes(content[: SIZE // 2])
    with (path / "disk.img").open("r+b") as disk:
        disk.truncate(SIZE)
    store = f"file://{path}/store"
    a = Daemon(
        path / "a", "--group", "vm1", "--volume", f"disk={path}/disk.img", "--listen", f"unix:{path}/a.sock",
        "--store", store, "--sync-interval", "1h",
    )  # fmt: skip
    peer = f"unix:{path}/peer.sock"
    b = Daemon(
        path / "b", "--peer", peer, "--listen", f"unix:{path}/b.sock",
        "--store", f"{store}-of-b" if other_store else store, "--sync-interval", "1h",
    )  # fmt: skip
    async with a, b:
        await a.call("sync", group="vm1")
        async with await NbdClient.connect(f"unix:{path}/a.sock") as guest:
            for offset in range(SIZE // 2, SIZE, MIB):
                await guest.write(offset, content[offset : offset + MIB])
            await guest.flush()
        yield Pair(a, b, peer, content)


async def read_all(path: Path, name: str) -> bytes:
    """The whole disk through a host's export."""
    async with await NbdClient.connect(f"unix:{path}/{name}.sock") as guest:
        return b"".join([bytes(await guest.read(offset, MIB)) for offset in range(0, SIZE, MIB)])


def phase(name: str):
    """Whether an event says that a phase begins."""
    return lambda event: event.get("event") == "phase-entered" and event["phase"] == name


def switched(event: dict) -> bool:
    """Whether an event says that the guest runs on the other host."""
    return event.get("event") == "switched-over"


@pytest.mark.slow
async def test_target_killed_before_the_claim(tmp_path: Path) -> None:
    """The source has its group back, and can move it later."""
    async with two_hosts(tmp_path) as pair:
        with contextlib.suppress(SiloError):
            await pair.a.migrate("vm1", pair.peer, until=phase("pre-copy"))
        await pair.b.kill()
        await pair.a.wait_group("vm1", lambda group: group["state"] == "running")
        assert await read_all(tmp_path, "a") == pair.content
        await pair.b.start()
        assert (await pair.a.migrate("vm1", pair.peer))["report"]["outcome"] == "released"
        assert await read_all(tmp_path, "b") == pair.content


@pytest.mark.slow
async def test_target_killed_after_the_claim_goes_on(tmp_path: Path) -> None:
    """Started again, it is still the owner, and gets the rest from the source."""
    async with two_hosts(tmp_path) as pair:
        with contextlib.suppress(SiloError):
            await pair.a.migrate("vm1", pair.peer, until=switched)
        await pair.b.kill()
        await pair.b.start()
        await pair.b.wait_group("vm1", lambda group: group["hydrated"] and group["state"] == "running")
        assert await read_all(tmp_path, "b") == pair.content
        async with asyncio.timeout(START_TIMEOUT_S):
            while await pair.a.group("vm1") is not None:  # until the target has told it, and it has forgotten
                await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_source_killed_before_the_handover_reopens(tmp_path: Path) -> None:
    """Nothing has moved; after its restart it serves as before, and the target has nothing."""
    async with two_hosts(tmp_path) as pair:
        with contextlib.suppress(SiloError):
            await pair.a.migrate("vm1", pair.peer, until=phase("pre-copy"))
        await pair.a.kill()
        await pair.a.start()
        owner = "a"
        status = await pair.a.group("vm1")
        if status is None or status["state"] != "running":
            # It had come further than we saw: then the target has it, and only the target.
            await pair.b.wait_group("vm1", lambda group: group["hydrated"])
            owner = "b"
        assert await read_all(tmp_path, owner) == pair.content


@pytest.mark.slow
async def test_source_killed_after_the_switch_serves_again(tmp_path: Path) -> None:
    """The target waits for what only the source has, and gets it when the source is started again."""
    async with two_hosts(tmp_path) as pair:
        with contextlib.suppress(SiloError):
            await pair.a.migrate("vm1", pair.peer, until=switched)
        await pair.a.kill()
        with contextlib.suppress(SiloError):  # refused when everything had arrived before the kill
            await pair.a.start()
        await pair.b.wait_group("vm1", lambda group: group["hydrated"] and group["state"] == "running")
        assert await read_all(tmp_path, "b") == pair.content


@pytest.mark.slow
async def test_hosts_with_different_stores_do_not_migrate(tmp_path: Path) -> None:
    """It is noticed before anything is sent, and the group stays where it is."""
    async with two_hosts(tmp_path, other_store=True) as pair:
        with pytest.raises(SiloError, match="store"):
            await pair.a.migrate("vm1", pair.peer)
        assert (await pair.a.group("vm1") or {})["state"] == "running"
        assert await pair.b.group("vm1") is None
        assert await read_all(tmp_path, "a") == pair.content


@pytest.mark.slow
async def test_the_only_host_dies_and_its_disk_is_lost(tmp_path: Path) -> None:
    """The newest committed cut comes back: everything up to it, nothing of what came later."""
    content = SystemClock().token(8 * MIB)
    (tmp_path / "disk.img").write_bytes(content)
    arguments = (
        "--listen",
        f"unix:{tmp_path}/a.sock",
        "--store",
        f"file://{tmp_path}/store",
        "--sync-interval",
        "1h",
    )
    a = Daemon(tmp_path / "a", "--group", "vm1", "--volume", f"disk={tmp_path}/disk.img", *arguments)
    async with a:
        async with await NbdClient.connect(f"unix:{tmp_path}/a.sock") as guest:
            await guest.write(MIB, b"covered")
            await a.call("sync", group="vm1")
            await guest.write(MIB, b"LOST")
            await guest.flush()
        await a.kill()
    (tmp_path / "disk.img").unlink()
    b = Daemon(
        tmp_path / "b", "--group", "vm1", "--volume", f"disk={tmp_path}/new.img,size=8M", "--host-is-dead",
        "--listen", f"unix:{tmp_path}/b.sock", "--store", f"file://{tmp_path}/store",
    )  # fmt: skip
    async with b, await NbdClient.connect(f"unix:{tmp_path}/b.sock") as guest:
        found = b"".join([bytes(await guest.read(offset, MIB)) for offset in range(0, 8 * MIB, MIB)])
    assert found == content[:MIB] + b"covered" + content[MIB + 7 :]
