"""What a client is told when its group is not ours any more: never that something was done, or is durable."""

from __future__ import annotations

import asyncio

import pytest

from silo.devices.memory import MemoryDevice
from silo.errors import ClosedError, FencedError, SiloError
from silo.exports.nbd_replies import replies_for
from silo.exports.nbd_service import NbdService
from silo.exports.nbd_session import HeaderStyle, Request
from silo.exports.nbd_wire import SIMPLE_REPLY, SIMPLE_REPLY_MAGIC, Command, CommandFlag, NbdError
from silo.group import Group
from tests.support.volumes import CHUNK, make_volume

COOKIE = 7
FENCED = FencedError("the epoch is over")


class HeldDevice(MemoryDevice):
    """A memory whose flush takes until it is told to end."""

    def __init__(self) -> None:
        super().__init__(4 * CHUNK)
        self.flushing = asyncio.Event()
        self.go = asyncio.Event()

    def flush_nowait(self) -> bool:
        return False

    async def flush(self) -> None:
        self.flushing.set()
        await self.go.wait()


def served() -> tuple[Group, HeldDevice, NbdService]:
    device = HeldDevice()
    group, volume = make_volume(device)
    return group, device, NbdService(volume, replies_for(HeaderStyle.SIMPLE), payload_max=1 << 20)


def request(command: Command, *, flags: int = 0) -> Request:
    length = 0 if command is Command.FLUSH else CHUNK
    payload = memoryview(bytearray(b"x" * CHUNK)) if command is Command.WRITE else None
    return int(command), flags, COOKIE, 0, length, payload


async def ask(service: NbdService, asked: Request) -> int:
    """The code of the reply."""
    out: list[bytes] = []
    for miss in service.serve_nowait([asked], out):
        out += await service.serve(miss)
    magic, code, cookie = SIMPLE_REPLY.unpack(out[0][: SIMPLE_REPLY.size])
    assert (magic, cookie) == (SIMPLE_REPLY_MAGIC, COOKIE)
    return int(code)


@pytest.mark.parametrize("error", [FENCED, ClosedError("closed")])
@pytest.mark.parametrize(
    "asked",
    [
        request(Command.READ),
        request(Command.WRITE),
        request(Command.WRITE, flags=CommandFlag.FUA),
        request(Command.TRIM, flags=CommandFlag.FUA),
        request(Command.WRITE_ZEROES),
        request(Command.FLUSH),
    ],
    ids=lambda asked: f"{Command(asked[0]).name}-{asked[1]}",
)
async def test_a_failed_gate_fails_every_request(asked: Request, error: SiloError):
    """Of flushes too: what they would make durable is on a disk that nobody will read again."""
    group, device, service = served()
    device.go.set()
    assert await ask(service, asked) == 0
    group.gate.fail(error)
    expected = NbdError.EIO if isinstance(error, FencedError) else NbdError.ESHUTDOWN
    assert await ask(service, asked) == expected
    assert await ask(service, asked) == expected, "and again"


async def test_a_flush_that_is_overtaken_by_a_claim_fails():
    """The gate fails while the disk is busy: when the disk is done, it is too late to say so."""
    group, device, service = served()
    async with asyncio.TaskGroup() as tasks:
        flush = tasks.create_task(ask(service, request(Command.FLUSH)))
        await device.flushing.wait()
        group.gate.fail(FENCED)
        device.go.set()
    assert flush.result() == NbdError.EIO


async def test_a_closed_gate_lets_a_flush_through():
    """A guest that is about to stop flushes; what it had been told is durable here, and in the handover."""
    group, device, service = served()
    device.go.set()
    await group.gate.close_and_drain()
    assert await ask(service, request(Command.FLUSH)) == 0
