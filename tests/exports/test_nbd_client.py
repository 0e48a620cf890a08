"""The client's driver, on one end of a socket pair whose other end the test holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from silo.errors import (
    CapacityError,
    ClosedError,
    InvalidRequestError,
    RemoteProtocolError,
    UnavailableError,
)
from silo.exports import nbd_client
from silo.exports.nbd_client import NbdClient
from silo.exports.nbd_client_dial import list_exports
from silo.exports.nbd_client_handshake import RemoteExport
from silo.exports.nbd_client_link import Link
from silo.exports.nbd_replies import replies_for
from silo.exports.nbd_session import HeaderStyle, RequestParser
from silo.exports.nbd_wire import (
    GREETING,
    INIT_MAGIC,
    OPTION_MAGIC,
    Command,
    CommandFlag,
    NbdError,
    TransmissionFlag,
)

SIZE = 64 << 20
FLAGS = TransmissionFlag((1 << 13) - 1) & ~TransmissionFlag.READ_ONLY
STYLES = list(HeaderStyle)


class Server:
    """The server's end of a connection. It answers when it is told to."""

    def __init__(self, connection: socket.socket, style: HeaderStyle) -> None:
        self.connection = connection
        self.parser = RequestParser(style)
        self.replies = replies_for(style)
        self.asked: list[tuple[int, int, int, int, int, bytes | None]] = []

    async def wait_asked(self, count: int) -> list[tuple[int, int, int, int, int, bytes | None]]:
        """Receive until ``count`` requests have come in all."""
        while len(self.asked) < count:
            await self.receive()
        return self.asked

    async def receive(self) -> int:
        """Receive once."""
        loop = asyncio.get_running_loop()
        count = await loop.sock_recv_into(self.connection, self.parser.get_buffer())
        self.parser.received(count)
        while batch := self.parser.next_batch(1 << 30):
            self.asked += [(*r[:5], None if r[5] is None else bytes(r[5])) for r in batch]
        return count

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.connection, data)

    async def done(self, request: tuple[int, int, int, int, int, bytes | None]) -> None:
        await self.send(self.replies.done(request[2], request[3]))

    async def content(self, request: tuple[int, int, int, int, int, bytes | None], content: bytes) -> None:
        await self.send(self.replies.data(request[2], request[3], request[4]) + content)

    async def wait_gone(self) -> None:
        """Receive until the client has closed its end, and close ours."""
        while await self.receive():
            pass
        self.connection.close()


@contextlib.contextmanager
def connected(style: HeaderStyle = HeaderStyle.STRUCTURED) -> Iterator[tuple[NbdClient, Server]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield (
            NbdClient(Link(ours), RemoteExport("disk", SIZE, FLAGS, style, contexts={1: "base:allocation"})),
            Server(theirs, style),
        )


@contextlib.asynccontextmanager
async def closing(client: NbdClient, server: Server):
    """Close both ends at the end, the way that both sides agree upon."""
    try:
        yield
    finally:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.wait_gone())
            await asyncio.sleep(0)
            server.connection.shutdown(socket.SHUT_WR)
            await client.aclose()


async def turns(count: int = 3) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("style", STYLES)
async def test_many_in_flight_answered_in_another_order(style: HeaderStyle) -> None:
    """Each caller gets the answer to its own question."""
    with connected(style) as (client, server):
        async with closing(client, server), asyncio.TaskGroup() as tasks:
            reads = [tasks.create_task(client.read(i * 512, 512)) for i in range(100)]
            asked = await server.wait_asked(100)
            for request in reversed(asked):
                await server.content(request, bytes([request[3] // 512]) * 512)
            for index, read in enumerate(reads):
                assert bytes([index]) * 512 == await read


@pytest.mark.parametrize("style", STYLES)
async def test_every_command_and_every_flag(style: HeaderStyle) -> None:
    with connected(style) as (client, server):
        async with closing(client, server), asyncio.TaskGroup() as tasks:
            calls = [
                client.write(512, b"w" * 512, fua=True),
                client.flush(),
                client.trim(0, 4096, fua=True),
                client.write_zeroes(0, 512, fua=True, no_hole=True),
                client.cache(0, SIZE),
            ]
            running = [tasks.create_task(call) for call in calls]
            asked = await server.wait_asked(5)
            for request in asked:
                await server.done(request)
            assert [await task for task in running] == [None, None, None, True, None]
            fua = CommandFlag.FUA
            assert [
                (Command.WRITE, fua, 512, 512, b"w" * 512),
                (Command.FLUSH, 0, 0, 0, None),
                (Command.TRIM, fua, 0, 4096, None),
                (Command.WRITE_ZEROES, fua | CommandFlag.NO_HOLE, 0, 512, None),
                (Command.CACHE, 0, 0, SIZE, None),
            ] == [(r[0], r[1], r[3], r[4], r[5]) for r in asked]


async def test_fast_zeroes_may_be_declined() -> None:
    """ENOTSUP is an answer to the question, not an error; everything else is an error."""
    with connected() as (client, server):
        async with closing(client, server), asyncio.TaskGroup() as tasks:
            declined = tasks.create_task(client.write_zeroes(0, 512, fast=True))
            (request,) = await server.wait_asked(1)
            await server.send(server.replies.error(request[2], 0, NbdError.ENOTSUP, "slow"))
            assert await declined is False
            tasks.create_task(expect(CapacityError, client.write_zeroes(0, 512)))
            _, request = await server.wait_asked(2)
            await server.send(server.replies.error(request[2], 0, NbdError.ENOSPC, "full"))


async def test_block_status() -> None:
    with connected() as (client, server):
        async with closing(client, server), asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.block_status(0, 4096))
            (request,) = await server.wait_asked(1)
            cookie = request[2]
            status = server.replies.status_chunk(cookie, 0, 1, [(512, 0), (8192, 3)])
            await server.send(status + server.replies.done(cookie, 0))
            assert await asking == {"base:allocation": [(512, 0), (8192, 3)]}


@pytest.mark.parametrize("style", STYLES)
async def test_large_payloads_through_a_small_socket(style: HeaderStyle) -> None:
    """Writes that do not fit into the socket wait until it takes more; nothing is torn or mixed up."""
    contents = [os.urandom((1 << 20) + i) for i in range(8)]
    with connected(style) as (client, server):
        async with closing(client, server), asyncio.TaskGroup() as tasks:
            writes = [tasks.create_task(client.write(i << 21, content)) for i, content in enumerate(contents)]
            asked = await server.wait_asked(8)
            assert contents == [request[5] for request in asked]
            for request in asked:
                await server.done(request)
            for write in writes:
                await write
            reads = [
                tasks.create_task(client.read(i << 21, len(content))) for i, content in enumerate(contents)
            ]
            asked = (await server.wait_asked(16))[8:]
            for index, request in enumerate(asked):
                await server.content(request, contents[index])
            assert contents == [bytes(await read) for read in reads]


@pytest.mark.parametrize("style", STYLES)
async def test_a_cancelled_read_ends_at_once_and_its_reply_is_dropped(style: HeaderStyle) -> None:
    with connected(style) as (client, server):
        async with closing(client, server), asyncio.TaskGroup() as tasks:
            buffer = bytearray(b"m" * 200_000)
            cancelled = tasks.create_task(client.read_into(0, buffer))
            (request,) = await server.wait_asked(1)
            reply = server.replies.data(request[2], 0, 200_000) + b"x" * 200_000
            await server.send(reply[:70_000])
            await turns()
            cancelled.cancel()
            await asyncio.wait([cancelled])
            buffer[:] = b"m" * 200_000
            kept = tasks.create_task(client.read(512, 512))
            await server.send(reply[70_000:])
            _, request = await server.wait_asked(2)
            await server.content(request, b"k" * 512)
            assert await kept == b"k" * 512
            assert cancelled.cancelled()
            assert buffer == b"m" * 200_000


async def test_settle_waits_for_cancelled_writes() -> None:
    """After it nothing that was cancelled can still happen."""
    with connected() as (client, server):
        async with closing(client, server), asyncio.TaskGroup() as tasks:
            await client.settle()
            write = tasks.create_task(client.write(0, b"w" * 512))
            (request,) = await server.wait_asked(1)
            write.cancel()
            await asyncio.wait([write])
            settling = tasks.create_task(client.settle())
            await turns()
            assert not settling.done()
            await server.done(request)
            await settling


async def test_a_write_cancelled_before_it_left_never_happened() -> None:
    with connected() as (client, server):
        async with closing(client, server), asyncio.TaskGroup() as tasks:
            blocking = tasks.create_task(client.write(0, bytes(4 << 20)))
            await turns()
            queued = tasks.create_task(client.write(0, b"q" * 512))
            flushing = tasks.create_task(client.flush())
            await turns()
            queued.cancel()
            await asyncio.wait([queued])
            for request in await server.wait_asked(2):
                await server.done(request)
            await blocking
            await flushing
            await client.settle()
            assert queued.cancelled()
            assert [request[0] for request in server.asked] == [Command.WRITE, Command.FLUSH]


async def test_a_lost_connection_fails_everybody() -> None:
    """Those in flight, those who wait for silence, and everyone who comes later."""
    with connected() as (client, server):
        async with asyncio.TaskGroup() as tasks:
            calls = [
                tasks.create_task(expect(UnavailableError, client.read(0, 512))),
                tasks.create_task(expect(UnavailableError, client.write(0, b"x" * 512))),
                tasks.create_task(expect(UnavailableError, client.settle())),
            ]
            await server.wait_asked(2)
            server.connection.close()
            for call in calls:
                await call
            await expect(UnavailableError, client.flush())
            await expect(UnavailableError, client.settle())
        await client.aclose()
        await expect(ClosedError, client.flush())


async def test_a_server_that_breaks_the_protocol_is_left() -> None:
    with connected() as (client, server):
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(expect(RemoteProtocolError, client.read(0, 512)))
            await server.wait_asked(1)
            await server.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await reading
            await expect(RemoteProtocolError, client.flush())
            await server.wait_gone()
        await client.aclose()


async def test_a_server_that_shuts_down_is_left_politely() -> None:
    """What is in flight is still answered; nothing new is asked; DISC is the last word."""
    with connected() as (client, server):
        async with asyncio.TaskGroup() as tasks:
            refused = tasks.create_task(expect(Exception, client.write(0, b"x" * 512)))
            answered = tasks.create_task(client.read(0, 512))
            first, second = await server.wait_asked(2)
            await server.send(server.replies.error(first[2], 0, NbdError.ESHUTDOWN, "bye"))
            await refused
            await expect(UnavailableError, client.flush())
            await server.content(second, b"r" * 512)
            assert await answered == b"r" * 512
            while not server.parser.ended:
                await server.receive()
            server.connection.close()
            await client.aclose()


async def test_closing_fails_what_is_in_flight_and_says_goodbye() -> None:
    with connected() as (client, server):
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(expect(ClosedError, client.read(0, 512)))
            await server.wait_asked(1)
            closed = tasks.create_task(client.aclose())
            await reading
            while not server.parser.ended:
                await server.receive()
            assert not closed.done(), "the server may still have something to finish"
            server.connection.close()
            await closed
        await client.aclose()
        await expect(ClosedError, client.read(0, 512))


async def test_aborting_says_nothing() -> None:
    with connected() as (client, server):
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(expect(ClosedError, client.read(0, 512)))
            await server.wait_asked(1)
            client.abort()
            await reading
        await server.wait_gone()
        assert not server.parser.ended
        await expect(ClosedError, client.flush())
        await client.aclose()


async def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_client, "_CLOSE_TIMEOUT_S", 0.01)
    with connected() as (client, server):
        await client.aclose()
        await server.wait_gone()
        assert server.parser.ended


async def test_refusals_of_the_session_reach_the_caller() -> None:
    with connected() as (client, server):
        async with closing(client, server):
            await expect(InvalidRequestError, client.read(SIZE, 512))
            await expect(InvalidRequestError, client.read(0, -1))
            await expect(InvalidRequestError, client.write(0, b""))
            assert server.asked == []


async def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    """The deadline covers connecting and agreeing, and the socket is closed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "nbd.sock"))
        listener.listen()
        await expect(UnavailableError, NbdClient.connect(f"unix:{tmp_path}/nbd.sock", timeout_s=0.01))
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(1) == b""


async def test_nobody_there(tmp_path: Path) -> None:
    await expect(UnavailableError, NbdClient.connect(f"unix:{tmp_path}/nothing.sock"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    await expect(UnavailableError, list_exports(f"tcp:127.0.0.1:{port}"))


async def test_a_server_that_hangs_up_or_is_no_nbd_server(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "nbd.sock"))
        listener.listen()
        greetings = [
            (UnavailableError, GREETING.pack(INIT_MAGIC, OPTION_MAGIC, 3)),
            (RemoteProtocolError, b"220 mail.example.org ESMTP\r\n"),
        ]
        for error, greeting in greetings:
            async with asyncio.TaskGroup() as tasks:
                call = tasks.create_task(expect(error, NbdClient.connect(f"unix:{tmp_path}/nbd.sock")))
                await turns(5)
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(greeting)
                await call


async def expect(error: type[Exception], awaitable) -> None:
    with pytest.raises(error):
        await awaitable
