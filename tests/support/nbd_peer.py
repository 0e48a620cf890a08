"""The other end of an NBD connection, on the same event loop as the server under test.

Like `tests.support.nbd.RawClient` it says whatever it is told to; unlike it, it shares the loop with the server,
so that a test can hold the server at any point and look inside.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from silo.exports.nbd_exports import NbdExport, NbdExports
from silo.exports.nbd_options import encode_info_request, encode_option
from silo.exports.nbd_server import NbdServer, NbdServerSettings
from silo.exports.nbd_tls import NbdTls
from silo.exports.nbd_wire import (
    CLIENT_FLAGS,
    GREETING,
    OPTION_REPLY,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    Command,
    Option,
    OptionReply,
)
from silo.volume import Volume

__all__ = ["Peer", "condition", "serving"]


async def condition(check: Callable[[], bool], turns: int = 10_000) -> None:
    """Let the loop turn until ``check`` holds."""
    for _ in range(turns):
        if check():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never came true")


@asynccontextmanager
async def serving(
    *volumes: Volume, settings: NbdServerSettings | None = None, tls: NbdTls | None = None, **options: object
) -> AsyncIterator[NbdServer]:
    """A server with an export ``group/<name>`` for every volume, closed at the end."""
    exports = NbdExports()
    for volume in volumes:
        exports.add(NbdExport(f"group/{volume.name}", volume, **options))
    async with asyncio.TaskGroup() as tasks:
        server = NbdServer(exports, tasks, settings=settings, tls=tls)
        try:
            yield server
        finally:
            await server.aclose()


class Peer:
    """One connection. ``async with Peer(server) as peer``."""

    def __init__(self, server: NbdServer | None = None, sock: socket.socket | None = None) -> None:
        if sock is None:
            sock, ours = socket.socketpair()
            if server is not None:
                server.welcome(ours)
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Vanish."""
        self.sock.close()

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        await self._loop.sock_sendall(self.sock, data)

    async def receive(self, size: int) -> bytes:
        """Exactly so many bytes. ``EOFError`` when the server closes before."""
        data = b""
        while len(data) < size:
            part = await self._loop.sock_recv(self.sock, size - len(data))
            if not part:
                raise EOFError(f"the server closed after {len(data)} of {size} bytes")
            data += part
        return data

    async def wait_closed(self) -> bytes:
        """Wait until the server closes; what it still said."""
        data = b""
        try:
            while part := await self._loop.sock_recv(self.sock, 1 << 16):
                data += part
        except ConnectionError:
            pass
        return data

    async def greet(self, flags: int = 3) -> None:
        """Exchange greetings."""
        await self.receive(GREETING.size)
        await self.send(CLIENT_FLAGS.pack(flags))

    async def option(self, option: int, data: bytes = b"") -> int:
        """Send an option; the type of the last reply."""
        await self.send(encode_option(option, data))
        while True:
            _, to, kind, length = OPTION_REPLY.unpack(await self.receive(OPTION_REPLY.size))
            assert to == option
            await self.receive(length)
            if kind == OptionReply.ACK or kind >= 1 << 31:
                return int(kind)

    async def go(self, name: str = "") -> None:
        """From the greeting to the transmission, with simple replies."""
        await self.greet()
        assert await self.option(Option.GO, encode_info_request(name)) == OptionReply.ACK

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
        *,
        flags: int = 0,
        cookie: int = 1,
    ) -> Awaitable[None]:
        """Send a request."""
        header = REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length or len(payload))
        return self.send(header + payload)

    async def reply(self, read: int = 0) -> tuple[int, int, bytes]:
        """Receive a simple reply: cookie, error, data."""
        _, error, cookie = SIMPLE_REPLY.unpack(await self.receive(SIMPLE_REPLY.size))
        return cookie, error, b"" if error else await self.receive(read)

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes; no other request may be in flight."""
        await self.request(Command.READ, offset, length)
        _, error, data = await self.reply(length)
        assert error == 0
        return data

    async def write(self, offset: int, payload: bytes, *, flags: int = 0) -> int:
        """Write; the error. No other request may be in flight."""
        await self.request(Command.WRITE, offset, payload=payload, flags=flags)
        return (await self.reply())[1]
