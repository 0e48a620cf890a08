"""Embed Silo: serve a disk, store it, and move it to another host in the same program.

Run it without arguments: it makes two hosts in a temporary directory, writes to the disk through NBD on the first
one, moves the group to the second, and reads there what was written.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import silo
from silo.exports.nbd_client import NbdClient

SIZE = 64 << 20
TEXT = b"written on the first host"


async def target(directory: Path, store: str, ready: asyncio.Event, moved: asyncio.Event) -> None:
    """The host that the group moves to: accepts what it is offered, onto its own disk."""
    async with silo.Host(directory / "b", listen=f"unix:{directory}/peer.sock") as host:
        ready.set()
        async for offer in host.offers():
            group = await offer.accept(
                {"disk": silo.FileDevice(directory / "b.img", SIZE)},
                store=store,
                export=f"unix:{directory}/b.sock",
            )
            await group.wait_running()
            async with await NbdClient.connect(f"unix:{directory}/b.sock") as guest:
                found = bytes(await guest.read(4096, len(TEXT)))
            print("the second host reads:", found.decode())
            await group.wait_hydrated()
            moved.set()
            return


async def source(directory: Path, store: str) -> None:
    """The host that the group starts on."""
    async with silo.Host(directory / "a") as host:
        group = await host.open_group(
            "vm1",
            {"disk": silo.FileDevice(directory / "a.img", SIZE)},
            store=store,
            sync=silo.SyncSettings(rpo_s=1),
        )
        nbd = await host.export(group, f"unix:{directory}/a.sock")
        async with await NbdClient.connect(nbd.uri("disk")) as guest:
            await guest.write(4096, TEXT)
            await guest.flush()
        async with group.migrate(f"unix:{directory}/peer.sock") as move:
            async for event in move.events():
                print(type(event).__name__, getattr(event, "phase", ""))
            report = await move.wait_released()
        print(f"downtime {report.downtime_ms:.1f} ms, {report.bytes_peer} bytes from host to host")


async def main() -> None:
    """Both hosts in one program; on two machines each would have its own."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        store = f"file://{directory}/store"
        ready, moved = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(target(directory, store, ready, moved))
            await ready.wait()
            await source(directory, store)
            await moved.wait()


if __name__ == "__main__":
    asyncio.run(main())
