"""A workload of your own: Silo stops it on one host and starts it on the other, with the state that it carries.

The "machine" here is a counter that writes its value to the disk. It is suspended at the source, its state travels
inside the handover, and it counts on at the target where it had stopped. An observer shows how to object.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import silo
from silo.exports.nbd_client import NbdClient

SIZE = 16 << 20


class Counter(silo.Workload):
    """Counts on its disk, four bytes at the start of it, until it is suspended."""

    def __init__(self) -> None:
        self.value = 0
        self.disk: NbdClient | None = None
        self._lock = asyncio.Lock()

    async def count(self) -> None:
        """One more, unless suspended."""
        async with self._lock:
            if self.disk is not None:
                self.value += 1
                await self.disk.write(0, self.value.to_bytes(4, "big"))

    async def start(self, uri: str) -> None:
        """Open the disk."""
        self.disk = await NbdClient.connect(uri)

    async def suspend(self, step: silo.Step) -> None:
        """Finish what is under way and leave the disk. Twice is harmless."""
        async with self._lock:
            disk, self.disk = self.disk, None
            if disk is not None:
                await disk.aclose()

    async def capture(self, step: silo.Step) -> bytes:
        """What is not on the disk: in a real machine, the state of its devices."""
        return self.value.to_bytes(4, "big")

    async def resume(self, step: silo.Step, state: bytes) -> None:
        """At the target: go on from the state."""
        self.value = int.from_bytes(state, "big")
        if self.disk is None:
            await self.start(step.devices["disk"])

    async def unsuspend(self, step: silo.Step) -> None:
        """At the source, when nothing came of it: run on."""
        if self.disk is None:
            await self.start(step.devices["disk"])


async def target(directory: Path, store: str, ready: asyncio.Event, counter: Counter) -> None:
    """Accept the group and let its workload run here."""
    async with silo.Host(directory / "b", listen=f"unix:{directory}/peer.sock") as host:
        ready.set()
        offer = await anext(host.offers())
        group = await offer.accept(
            {"disk": silo.FileDevice(directory / "b.img", SIZE)},
            store=store,
            workload=counter,
            export=f"unix:{directory}/b.sock",
        )
        await group.wait_running()
        for _ in range(5):
            await counter.count()
        await group.wait_hydrated()
        await counter.suspend(silo.Step(role=silo.Role.TARGET, deadline=0.0))


async def main() -> None:
    """Count to five on the first host, move, count five more on the second."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        store = f"file://{directory}/store"
        here, there, ready = Counter(), Counter(), asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            arriving = tasks.create_task(target(directory, store, ready, there))
            await ready.wait()
            async with silo.Host(directory / "a") as host:
                disk = silo.FileDevice(directory / "a.img", SIZE)
                group = await host.open_group("vm1", {"disk": disk}, store=store, workload=here)
                nbd = await host.export(group, f"unix:{directory}/a.sock")
                await here.start(nbd.uri("disk"))
                for _ in range(5):
                    await here.count()

                def object_to_a_large_rest(event: silo.MigrationEvent) -> None:
                    """An observer that raises stops the migration, as long as the target has not claimed."""
                    if getattr(event, "exposed_bytes", 0) > 1 << 30:
                        raise silo.MigrationAborted("too much would stand still")

                async with group.migrate(
                    f"unix:{directory}/peer.sock", observers=[object_to_a_large_rest]
                ) as move:
                    await move.wait_released()
            await arriving
        print(f"counted to {here.value} on the first host and to {there.value} on the second")


if __name__ == "__main__":
    asyncio.run(main())
