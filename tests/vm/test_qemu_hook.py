"""The QEMU example, played with a real machine: it moves while it works, after two attempts that come to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

import silo
from silo.clock import SystemClock
from silo.exports.nbd_client import NbdClient
from silo.hooks.command import CommandWorkload
from silo.hooks.inprocess import HOOKS
from tests.support.source import ROOT

HOOK = ROOT / "examples" / "qemu" / "hook"
SIZE = 16 << 20

PROGRAM = bytes.fromhex(
    "31c0 8ed8 8ec0 8ed0"  #           ds = es = ss = 0
    "bc007c"  #                        sp = 0x7c00, below this program
    "8816357c"  #                      remember the BIOS's number of the disk
    "66ff06387c"  #             again: count
    "66a1387c 66a30080"  #             put the number into a buffer of one sector
    "be3c7c b80043 8a16357c cd13"  #   write the buffer to the second sector
    "7202 ebe3"  #                     go on if that went well
    "baf803 b045 ee f4 ebf7"  #        else say E on the serial line and stop
    "00 6690"  #                       the number of the disk, and padding
    "00000000"  #                      the count
    "1000 0100 00800000 0100000000000000"  # one sector from 0000:8000 to sector 1
)
"""A machine without an operating system: it counts in its memory, and writes each number to its disk."""


@attrs.frozen
class Machine:
    """One host's part: its sockets, its disk, and what its hooks are told."""

    directory: Path
    name: str
    peer: str

    @property
    def socket(self) -> Path:
        """Where Silo serves the disk."""
        return self.directory / f"{self.name}.sock"

    @property
    def image(self) -> Path:
        return self.directory / f"{self.name}.img"

    def command(self) -> str:
        """The hook, in its environment."""
        values = {
            "VM_RUN": self.directory / self.name,
            "VM_DISK": self.socket,
            "VM_LISTEN": f"unix:{self.directory}/{self.name}.memory",
            "VM_PEER": f"unix:{self.directory}/{self.peer}.memory",
        }
        return " ".join(f"{name}={value}" for name, value in values.items()) + f" {HOOK}"

    def workload(self, clock: SystemClock, **others: str) -> CommandWorkload:
        steps = dict.fromkeys({*HOOKS} - {"quiesce", "unquiesce", "capture", "probe"}, self.command())
        return CommandWorkload(steps | others, clock)

    async def count(self) -> int:
        """The last number on the disk."""
        disk = await NbdClient.connect(f"nbd+unix:///vm1/disk?socket={self.socket}")
        try:
            return int.from_bytes(await disk.read(512, 4), "little")
        finally:
            await disk.aclose()

    async def count_past(self, number: int) -> int:
        """Wait until the machine has counted further than that."""
        while (count := await self.count()) <= number:
            await asyncio.sleep(0.05)
        return count

    def kill(self) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((self.directory / self.name / "vm1.pid").read_text()), 9)


@pytest.fixture
def machines(tmp_path: Path, require_tool: Callable[[str], str]) -> Iterator[tuple[Machine, Machine]]:
    require_tool("qemu-system-x86_64")
    here, there = Machine(tmp_path, "a", "b"), Machine(tmp_path, "b", "a")
    here.image.write_bytes(PROGRAM.ljust(510, b"\0") + b"\x55\xaa" + bytes(SIZE - 512))
    yield here, there
    here.kill()
    there.kill()


async def receive(machine: Machine, clock: SystemClock, ready: asyncio.Event, seen: list[int]) -> None:
    """Be the other host: take the group in when it really comes, and let it work until it is whole."""
    directory = machine.directory
    async with silo.Host(directory / "state-b", listen=f"unix:{directory}/peer.sock") as host:
        ready.set()
        async for offer in host.offers():
            group = await offer.accept(
                {"disk": silo.FileDevice(machine.image, SIZE)},
                store=f"file://{directory}/store",
                workload=machine.workload(clock),
                export=f"unix:{machine.socket}",
            )
            try:
                await group.wait_running()
            except silo.MigrationAborted:
                await host.close_group(group)
                continue
            seen.append(await machine.count())
            await group.wait_hydrated()
            seen.append(await machine.count_past(seen[-1]))
            machine.kill()
            return


@pytest.mark.vm
@pytest.mark.slow
async def test_a_machine_moves_and_never_forgets_where_it_was(machines, clock, expect_log):
    """Its count lives in its memory: were it started anew, or run twice, the numbers on the disk would tell."""
    expect_log.allow(
        "a command is interrupted"
    )  # the other host's hook, when this one gives up before it is done
    here, there = machines
    directory = here.directory
    ready, arrived = asyncio.Event(), []
    failing = directory / "failing"
    workload = here.workload(
        clock,
        flush=f'if [ "$(cat {failing})" = flush ]; then exit 7; fi; {here.command()}',
        capture=f'[ "$(cat {failing})" != capture ]',
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(receive(there, clock, ready, arrived))
        await ready.wait()
        async with silo.Host(directory / "state-a") as host:
            group = await host.open_group(
                "vm1",
                {"disk": silo.FileDevice(here.image, SIZE)},
                store=f"file://{directory}/store",
                workload=workload,
            )
            await host.export(group, f"unix:{here.socket}")
            start = await asyncio.create_subprocess_shell(f"{here.command()} start", stderr=subprocess.PIPE)
            assert await start.wait() == 0, await start.stderr.read()
            count = await here.count_past(20)
            for failing_step in ("flush", "capture"):  # before and after QEMU has sent everything
                failing.write_text(failing_step)
                with pytest.raises(silo.MigrationAborted, match=f"hook {failing_step} of the workload"):
                    async with group.migrate(f"unix:{directory}/peer.sock") as move:
                        await move.wait_released()
                count = await here.count_past(count)
            failing.write_text("nothing")
            async with group.migrate(f"unix:{directory}/peer.sock") as move:
                report = await move.wait_released()
    assert count < arrived[0] < arrived[1]
    assert report.downtime_ms is not None
    assert not (directory / "a" / "vm1.pid").exists(), "the machine here was not fenced"
