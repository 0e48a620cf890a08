"""A guest of real daemons that outlives them: it checks every read, and notices when it would run twice.

The daemons' hooks talk to it over a Unix socket with the same one-line commands as to the demo's guest, with the name
of the host before each (``a suspend``, ``b resume nbd+unix://...``). When the process that serves its disk dies it
waits for the next one, as a virtual machine does whose disk hangs, and then looks what became of the write that was
under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from silo.demo import say
from silo.errors import SiloError
from silo.exports.nbd_client import NbdClient

BLOCK = 4096
BLOCKS_MAX = 8
WRITE_SHARE = 0.4
PAUSE_S = 0.002
RECONNECT_S = 0.05


class LiveGuest:
    """One sequential program. ``faults`` must stay empty."""

    def __init__(self, content: bytes, socket: Path, seed: int) -> None:
        self.model = bytearray(content)
        self.faults: list[str] = []
        self.ops = 0
        self.host: str | None = None
        """Where it runs; ``None`` while it is suspended."""
        self.socket = socket
        self._uri = ""
        self._chance = random.Random(seed)
        self._disk: NbdClient | None = None
        self._wake = asyncio.Event()
        self._busy = asyncio.Lock()
        self._unclear: tuple[int, bytes] | None = None

    def hooks(self, host: str) -> dict[str, str]:
        """The shell commands of a host's workload."""
        call = shlex.join([sys.executable, "-S", "-E", say.__file__, str(self.socket), host])
        return {
            "suspend": f"{call} suspend",
            "unsuspend": f'{call} resume "$SILO_URI"',
            "resume": f'{call} resume "$SILO_URI"',
            "fence": f"{call} fence",
        }

    async def obey(self, host: str, verb: str, uri: str) -> str:
        """One hook of one host."""
        if verb == "suspend" and self.host == host:
            self.host = None
            async with self._busy:
                await self._leave()
        if verb == "resume":
            if self.host not in (None, host):
                self.faults.append(f"it was started on {host} while it ran on {self.host}")
            self.host, self._uri = host, uri
            self._wake.set()
        if verb == "fence" and self.host == host:
            self.faults.append(f"it was fenced on {host}, where it runs")
        return "ok"

    async def run(self) -> None:
        """Work until cancelled, or until the first fault."""
        while not self.faults:
            if self.host is None:
                self._wake.clear()
                await self._wake.wait()
            async with self._busy:
                if self.host is None:
                    continue
                try:
                    await self._step()
                except SiloError:
                    await self._leave()
                    await asyncio.sleep(RECONNECT_S)
            await asyncio.sleep(PAUSE_S)

    async def stop(self) -> None:
        """Finish what is under way and leave the disk."""
        self.host = None
        async with self._busy:
            await self._leave()

    async def wait_ops(self, count: int) -> None:
        """Return when it has done so much more. The caller brings the deadline."""
        goal = self.ops + count
        while self.ops < goal and not self.faults:
            await asyncio.sleep(0.02)

    async def _leave(self) -> None:
        disk, self._disk = self._disk, None
        if disk is not None:
            await disk.aclose()

    async def _step(self) -> None:
        if self._disk is None:
            self._disk = await NbdClient.connect(self._uri)
        if self._unclear is not None:
            await self._look_again(self._disk)
        blocks = len(self.model) // BLOCK
        count = self._chance.randint(1, BLOCKS_MAX)
        start = self._chance.randrange(blocks - count) * BLOCK
        stop = start + count * BLOCK
        if self._chance.random() < WRITE_SHARE:
            content = self._chance.randbytes(stop - start)
            self._unclear = (start, content)
            await self._disk.write(start, content)
            self.model[start:stop] = content
            self._unclear = None
        else:
            found = bytes(await self._disk.read(start, stop - start))
            if found != self.model[start:stop]:
                self.faults.append(f"[{start}:{stop}] on {self.host} is not what was written")
        self.ops += 1

    async def _look_again(self, disk: NbdClient) -> None:
        assert self._unclear is not None
        start, content = self._unclear
        found = bytes(await disk.read(start, len(content)))
        for offset in range(0, len(content), BLOCK):
            block = found[offset : offset + BLOCK]
            if block not in (
                content[offset : offset + BLOCK],
                self.model[start + offset : start + offset + BLOCK],
            ):
                self.faults.append(f"block {start + offset} is neither what was written nor what was there")
            self.model[start + offset : start + offset + BLOCK] = block
        self._unclear = None


@contextlib.asynccontextmanager
async def live_guest(content: bytes, socket: Path, seed: int) -> AsyncIterator[LiveGuest]:
    """A guest at work, and the socket on which it obeys."""
    guest = LiveGuest(content, socket, seed)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if line.endswith(b"\n"):  # else the hook was killed with its daemon before it had said anything
                host, verb, *rest = line.decode().split()
                writer.write((await guest.obey(host, verb, rest[0] if rest else "")).encode() + b"\n")
                await writer.drain()
        except OSError:
            pass  # the hook did not wait for the answer
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, socket)
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(guest.run())
        try:
            yield guest
        finally:
            work.cancel()
            server.close()
            await guest.stop()
