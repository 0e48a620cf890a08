"""Streams between hosts over plain sockets, TCP or Unix.

asyncio's own transports copy every buffer at least once and join small ones; here the kernel reads into the
caller's buffer and gathers from the caller's buffers (``recv_into``, ``sendmsg``), and the loop is asked
only when the socket would block. A send or receive that does not have to wait does not yield to other
tasks: whoever loops over them must.

Plain TCP between hosts is readable and forgeable by anyone in between, so it must be asked for by name
(``insecure_tcp``). Unix sockets are as private as their directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from silo.abc import Buffer, Connection, Listener, Transport
from silo.addresses import TcpAddress, UnixAddress, parse_address
from silo.errors import ClosedError, InvalidRequestError, UnavailableError
from silo.sockets import address_of, listen_on, peer_of, tune

__all__ = ["PlainTransport"]

IOV_MAX = 512
"""Buffers per ``sendmsg``; Linux takes 1024."""
SEND_MAX = 1 << 20
"""Bytes per ``sendmsg``, so that one call never holds the loop for long."""


class PlainTransport(Transport):
    """Unencrypted streams. Without ``insecure_tcp``, ``tcp:`` addresses are refused with `InvalidRequestError`."""

    def __init__(self, *, insecure_tcp: bool = False) -> None:
        self.insecure_tcp = insecure_tcp

    async def connect(self, url: str) -> Connection:
        """Connect, trying every address of a host name in turn. No deadline: wrap it in ``asyncio.timeout``.

        Cancellation leaves nothing behind. Concurrent calls are allowed.
        """
        address = self._parse(url)
        loop = asyncio.get_running_loop()
        if isinstance(address, UnixAddress):
            return await _connect(socket.AF_UNIX, address.path, url)
        try:
            found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise UnavailableError(f"cannot find {address.host}: {error.strerror or error}") from error
        for family, _, _, _, target in found[:-1]:
            with contextlib.suppress(UnavailableError):
                return await _connect(family, target, url)
        return await _connect(found[-1][0], found[-1][4], url)

    async def listen(self, url: str) -> Listener:
        """Bind and listen. See `silo.abc.Transport.listen`."""
        return SocketListener(listen_on(self._parse(url)))

    def _parse(self, url: str) -> TcpAddress | UnixAddress:
        address = parse_address(url)
        if isinstance(address, TcpAddress) and not self.insecure_tcp:
            raise InvalidRequestError(
                f"{url} would be spoken to without encryption",
                hint="give this host its certificate (--tls-dir, `silo certs` makes it), allow plain TCP "
                "(--insecure-peer), or use a Unix socket",
            )
        return address


class SocketConnection(Connection):
    """One connected socket. One receiver and one sender at a time, which may be different tasks."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self._socket = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[None]] = set()

    async def receive_into(self, buffer: memoryview) -> int:
        """See `silo.abc.Connection`. A cancelled receive has taken nothing."""
        while True:
            self._check_open()
            try:
                return self._socket.recv_into(buffer)
            except (BlockingIOError, InterruptedError):
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
            except OSError as error:
                raise UnavailableError(f"the link to {self.peer} broke: {error.strerror or error}") from error

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """See `silo.abc.Connection`."""
        left = deque(memoryview(buffer) for buffer in buffers if len(buffer))
        while left:
            self._check_open()
            try:
                count = self._socket.sendmsg(_first_of(left))
            except (BlockingIOError, InterruptedError):
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
                continue
            except OSError as error:
                raise UnavailableError(f"the link to {self.peer} broke: {error.strerror or error}") from error
            while count:
                if count >= len(left[0]):
                    count -= len(left.popleft())
                else:
                    left[0] = left[0][count:]
                    count = 0

    async def aclose(self) -> None:
        """See `silo.abc.Connection`. What the kernel has accepted is still delivered."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._fd = -1
        self._socket.close()
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(self._closed())

    async def _ready(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        """Wait until the socket can be read from, or written to. No deadline: the caller has one, or a reason."""
        waiting = self._loop.create_future()
        self._waiting.add(waiting)
        add(self._fd, _wake, waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
            if self._fd >= 0:
                remove(self._fd)

    def _check_open(self) -> None:
        if self._fd < 0:
            raise self._closed()

    def _closed(self) -> ClosedError:
        return ClosedError(f"the connection to {self.peer} is closed")


class SocketListener(Listener):
    """A listening socket. A Unix socket's file goes with it."""

    def __init__(self, sock: socket.socket) -> None:
        self.url = str(address_of(sock))
        self._socket = sock
        self._fd = sock.fileno()
        self._waiting: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def accept(self) -> Connection:
        """See `silo.abc.Listener`. One call at a time. No deadline: waiting for callers is what it is for."""
        while True:
            if self._fd < 0:
                raise ClosedError(f"{self.url} is closed")
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                await self._ready()
                continue
            except OSError as error:
                raise UnavailableError(f"cannot accept on {self.url}: {error.strerror or error}") from error
            tune(sock)
            return SocketConnection(sock, peer_of(sock))

    async def aclose(self) -> None:
        """See `silo.abc.Listener`."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._fd = -1
        if self._socket.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                os.unlink(self._socket.getsockname())
        self._socket.close()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ClosedError(f"{self.url} is closed"))

    async def _ready(self) -> None:
        self._waiting = self._loop.create_future()
        self._loop.add_reader(self._fd, _wake, self._waiting)
        try:
            await self._waiting
        finally:
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _first_of(left: deque[memoryview]) -> list[memoryview]:
    """As many buffers from the front as one ``sendmsg`` should take; the last one may be cut."""
    some: list[memoryview] = []
    room = SEND_MAX
    for buffer in left:
        if len(some) == IOV_MAX or room <= 0:
            break
        some.append(buffer[:room])
        room -= len(buffer)
    return some


async def _connect(family: int, target: object, url: str) -> SocketConnection:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        tune(sock)
        await asyncio.get_running_loop().sock_connect(sock, target)  # type: ignore[arg-type]
    except OSError as error:
        sock.close()
        raise UnavailableError(
            f"nobody answers at {url}: {error.strerror or error}", hint="is the other host serving?"
        ) from error
    except BaseException:
        sock.close()
        raise
    return SocketConnection(sock, url)
