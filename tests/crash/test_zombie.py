"""A host that was declared dead and comes back: a real ``silo serve``, stopped and continued."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from silo.errors import SiloError
from silo.exports.nbd_client import NbdClient
from tests.support.daemons import Daemon

pytestmark = pytest.mark.crash

MIB = 1 << 20


def daemon(directory: Path, name: str, *arguments: str) -> Daemon:
    """A host with the group vm1 on a disk of its own, and with the store of all."""
    return Daemon(
        directory / name, "--group", "vm1", "--volume", f"disk={directory}/{name}.img,size=8M",
        "--listen", f"unix:{directory}/{name}.sock", "--store", f"file://{directory}/store",
        "--sync-interval", "200ms", *arguments,
    )  # fmt: skip


def guest(directory: Path, name: str):
    return NbdClient.connect(f"unix:{directory}/{name}.sock")


@pytest.mark.slow
async def test_a_zombie_stops_its_guest_and_stays_closed(tmp_path: Path) -> None:
    """Its guest gets errors, what it wrote stays on its disk, and the one that took over does not notice."""
    async with daemon(tmp_path, "a") as a:
        disk = await guest(tmp_path, "a")
        await disk.write(0, b"stored")
        generation = (await a.call("sync", group="vm1"))["generation"]
        a.signal(signal.SIGSTOP)

        refused = daemon(tmp_path, "b")
        with pytest.raises(SiloError, match="belongs to another writer"):
            await refused.start()
        await refused.kill()
        async with daemon(tmp_path, "b", "--host-is-dead") as b:
            other = await guest(tmp_path, "b")
            assert bytes(await other.read(0, 6)) == b"stored"
            await other.write(MIB, b"newer")
            taken = (await b.call("sync", group="vm1"))["generation"]
            assert taken == generation + 1

            a.signal(signal.SIGCONT)
            await disk.write(2 * MIB, b"unsaved")
            await a.wait_group("vm1", lambda group: group["state"] == "fenced")
            for call in (disk.read(0, 512), disk.write(0, bytes(512))):
                with pytest.raises(SiloError):
                    await call
            await disk.aclose()
            assert await a.stop() == 0
            assert "belongs to another writer" in a.log
            with (tmp_path / "a.img").open("rb") as image:
                image.seek(2 * MIB)
                assert image.read(7) == b"unsaved"
            with pytest.raises(SiloError, match="what is here was last written in epoch 1"):
                await a.start()

            assert bytes(await other.read(MIB, 5)) == b"newer"
            assert bytes(await other.read(2 * MIB, 7)) == bytes(7)
            await other.write(3 * MIB, b"goes on")
            assert (await b.call("sync", group="vm1"))["generation"] == taken + 1
            await other.aclose()
