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
import stat
from collections import deque
from collections.abc import Callable, Sequence

from silo.abc import Buffer, Connection, Listener, Transport
from silo.addresses import TcpAddress, UnixAddress, parse_address
from silo.errors import ClosedError, InvalidRequestError, UnavailableError

__all__ = ["PlainTransport"]

IOV_MAX = 512
"""Buffers per ``sendmsg``; Linux takes 1024."""
SEND_MAX = 1 << 20
"""Bytes per ``sendmsg``, so that one call never holds the loop for long."""
UNIX_BUFFER = 1 << 20
"""Unix sockets start with about 200 KiB and do not grow by themselves; TCP does."""
BACKLOG = 128
KEEPALIVE_IDLE_S = 10
"""The protocol has its own keep-alive; this one is for connections that wait to be greeted."""


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
        address = self._parse(url)
        if isinstance(address, UnixAddress):
            return SocketListener(_listen_unix(address.path), str(address))
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise InvalidRequestError(f"cannot listen on {url}: {error.strerror or error}") from error
        family, _, _, _, target = found[0]
        sock = _listen(family, target, url)
        return SocketListener(sock, str(TcpAddress(address.host, sock.getsockname()[1])))

    def _parse(self, url: str) -> TcpAddress | UnixAddress:
        address = parse_address(url)
        if isinstance(address, TcpAddress) and not self.insecure_tcp:
            raise InvalidRequestError(
                f"{url} would be spoken to without encryption",
                hint="allow that explicitly, or use a Unix socket",
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

    def __init__(self, sock: socket.socket, url: str) -> None:
        self.url = url
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
                sock, name = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                await self._ready()
                continue
            except OSError as error:
                raise UnavailableError(f"cannot accept on {self.url}: {error.strerror or error}") from error
            _tune(sock)
            return SocketConnection(sock, _peer_name(name) if isinstance(name, tuple) else self.url)

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


def _peer_name(name: tuple[str, int]) -> str:
    return str(TcpAddress(name[0], name[1]))


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNIX_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)


async def _connect(family: int, target: object, url: str) -> SocketConnection:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _tune(sock)
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


def _listen(family: int, target: object, url: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)  # type: ignore[arg-type]
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise InvalidRequestError(f"cannot listen on {url}: {error.strerror or error}") from error
    return sock


def _listen_unix(path: str) -> socket.socket:
    """Bind a Unix socket, replacing the file of a server that is dead and refusing that of one that lives."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise InvalidRequestError(f"cannot listen on {path}: there is a file that is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except OSError as error:
                raise InvalidRequestError(f"cannot listen on {path}: {error.strerror or error}") from error
            else:
                raise InvalidRequestError(f"cannot listen on {path}: somebody does already")
    return _listen(socket.AF_UNIX, path, f"unix:{path}")
