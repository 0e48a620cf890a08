"""The demo's guest: a process that uses the disk, knows what it must hold, and checks every byte it reads.

Several workers read extents from everywhere and overwrite blocks of one file. The *model* is a file of the
same size in shared memory with the demo: a write enters the model when it is acknowledged, and a read is
compared with it. Blocks that somebody is writing meanwhile are left out of the comparison, since both contents
are right then.

The guest obeys lines on a Unix socket, as a virtual machine obeys its manager::

    suspend           finish what is under way, leave the disk     ->  ok
    resume <uri>      go on, on the disk at this address           ->  ok
    stats             numbers so far                               ->  {...}
    stop              suspend, and end the process                 ->  {...}

A wrong byte, or an I/O error, ends the process with the reason in its last words.
"""

from __future__ import annotations

import asyncio
import mmap
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import msgspec

from silo.abc import Clock
from silo.clock import SystemClock
from silo.errors import SiloError
from silo.exports.nbd_client import NbdClient

__all__ = ["Guest", "GuestPlan", "GuestStats", "run_guest"]

BLOCK = 4096
READ_BLOCKS_MAX = 16
WORKERS = 8
WRITE_SHARE = 0.3


class GuestStats(msgspec.Struct):
    """What the guest has done so far."""

    ops: int = 0
    reads: int = 0
    writes: int = 0
    read_max_ms: float = 0.0
    running: bool = False
    fault: str = ""


class GuestPlan(msgspec.Struct, frozen=True):
    """What the guest is told at its start."""

    model: str
    control: str
    writable: tuple[tuple[int, int], ...]
    seed: int
    pause_ms: float = 1.0


@attrs.define
class Guest:
    """The workers and their model. ``chance`` decides what they do; the same seed asks the same questions."""

    plan: GuestPlan
    model: mmap.mmap
    clock: Clock
    stats: GuestStats = attrs.field(factory=GuestStats)
    _chance: random.Random = attrs.field(init=False)
    _writable: list[int] = attrs.field(init=False)
    _writing: set[int] = attrs.field(factory=set)
    _versions: dict[int, int] = attrs.field(factory=dict)
    _disk: NbdClient | None = None
    _may_run: asyncio.Event = attrs.field(factory=asyncio.Event)
    _under_way: int = 0
    _idle: asyncio.Event = attrs.field(factory=asyncio.Event)

    def __attrs_post_init__(self) -> None:
        self._chance = random.Random(self.plan.seed)
        self._writable = [
            block
            for offset, length in self.plan.writable
            for block in range(offset // BLOCK, (offset + length) // BLOCK)
        ]
        self._idle.set()

    async def work(self) -> None:
        """Run the workers until one of them finds a fault. No deadline: the demo says when to stop."""
        async with asyncio.TaskGroup() as workers:
            for _ in range(WORKERS):
                workers.create_task(self._worker())

    async def _worker(self) -> None:
        while True:
            await self._may_run.wait()
            self._under_way += 1
            self._idle.clear()
            try:
                if self._disk is not None:
                    await (self._write if self._chance.random() < WRITE_SHARE else self._read)(self._disk)
            finally:
                self._under_way -= 1
                if not self._under_way:
                    self._idle.set()
            await asyncio.sleep(self.plan.pause_ms / 1e3)

    async def _write(self, disk: NbdClient) -> None:
        block = self._chance.choice(self._writable)
        if block in self._writing:
            return
        content = self._chance.randbytes(BLOCK)
        self._writing.add(block)
        try:
            await disk.write(block * BLOCK, content)
            self.model[block * BLOCK : (block + 1) * BLOCK] = content
            self._versions[block] = self._versions.get(block, 0) + 1
        finally:
            self._writing.discard(block)
        self.stats.writes += 1
        self.stats.ops += 1

    async def _read(self, disk: NbdClient) -> None:
        count = self._chance.randint(1, READ_BLOCKS_MAX)
        first = self._chance.randrange(len(self.model) // BLOCK - count)
        if self._chance.random() < 0.2:
            first = min(self._chance.choice(self._writable), len(self.model) // BLOCK - count)
        blocks = range(first, first + count)
        before = [(block in self._writing, self._versions.get(block, 0)) for block in blocks]
        started = self.clock.monotonic()
        content = await disk.read(first * BLOCK, count * BLOCK)
        self.stats.read_max_ms = max(self.stats.read_max_ms, (self.clock.monotonic() - started) * 1e3)
        for number, (block, (writing, version)) in enumerate(zip(blocks, before, strict=True)):
            if writing or block in self._writing or version != self._versions.get(block, 0):
                continue
            found = bytes(content[number * BLOCK : (number + 1) * BLOCK])
            if found != self.model[block * BLOCK : (block + 1) * BLOCK]:
                raise SiloError(f"block {block} does not hold what was written to it")
        self.stats.reads += 1
        self.stats.ops += 1

    async def suspend(self) -> None:
        """Finish what is under way and leave the disk. Twice is harmless. Bounded by the disk's own answers."""
        self._may_run.clear()
        await self._idle.wait()
        disk, self._disk = self._disk, None
        if disk is not None:
            await disk.aclose()
        self.stats.running = False

    async def resume(self, uri: str) -> None:
        """Run on, on the disk at ``uri``. Twice is harmless."""
        if self._disk is None:
            self._disk = await NbdClient.connect(uri)
        self._may_run.set()
        self.stats.running = True


async def _obey(guest: Guest, verb: str, argument: str) -> str:
    if verb in ("suspend", "stop"):
        await guest.suspend()
    if verb == "resume":
        await guest.resume(argument)
    if verb in ("stats", "stop"):
        return msgspec.json.encode(guest.stats).decode()
    return "ok" if verb in ("suspend", "resume") else f"what is {verb!r}?"


def _listener(
    guest: Guest, stop: asyncio.Event
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            verb, _, argument = line.decode().strip().partition(" ")
            writer.write((await _obey(guest, verb, argument)).encode() + b"\n")
            await writer.drain()
            if verb == "stop":
                stop.set()
        writer.close()

    return serve


def _open_model(path: str) -> mmap.mmap:
    with Path(path).open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


async def run_guest(plan: GuestPlan) -> GuestStats:
    """Be the guest until told to stop. The fault, if any, is in the result."""
    model = _open_model(plan.model)
    guest = Guest(plan, model, SystemClock())
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_unix_server(_listener(guest, stop), plan.control)
    sys.stdout.write('{"event": "ready"}\n')
    sys.stdout.flush()
    try:
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(guest.work())
            await stop.wait()
            work.cancel()
    except* SiloError as errors:
        fault: BaseException = errors
        while isinstance(fault, BaseExceptionGroup):
            fault = fault.exceptions[0]
        guest.stats.fault = str(fault)
    finally:
        server.close()
        model.flush()
        model.close()
    return guest.stats


def main() -> None:
    """The process: the plan is its one argument, in JSON; the last line that it prints is what it did."""
    stats = asyncio.run(run_guest(msgspec.json.decode(sys.argv[1], type=GuestPlan)))
    sys.stdout.write(msgspec.json.encode(stats).decode() + "\n")
    sys.exit(bool(stats.fault))


if __name__ == "__main__":
    main()
