"""Listening sockets and the options that every one of our connections wants.

Thin: addresses in, sockets out, errors in our own words. Nothing here waits; binding and connecting to a local
path do not block.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct

from silo.addresses import TcpAddress, UnixAddress
from silo.errors import InvalidRequestError

__all__ = ["address_of", "listen_on", "peer_of", "tune"]

_BACKLOG = 128
_UNIX_BUFFER = 1 << 20
"""Unix sockets start with about 200 KiB and do not grow by themselves; TCP does."""
_KEEPALIVE_IDLE_S = 60
"""After a minute of silence the kernel asks whether the other side still exists."""
_KEEPALIVE_INTERVAL_S = 10
_KEEPALIVE_COUNT = 6
_CREDENTIALS = struct.Struct("3i")


def listen_on(address: UnixAddress | TcpAddress) -> socket.socket:
    """A non-blocking listening socket. The file of a dead server is replaced, that of a living one refused.

    `InvalidRequestError` when the address cannot be had.
    """
    if isinstance(address, UnixAddress):
        _remove_stale(address.path)
        return _listen(socket.AF_UNIX, address.path, address)
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise InvalidRequestError(f"cannot listen on {address}: {error.strerror or error}") from error
    family, _, _, _, target = found[0]
    return _listen(family, target, address)


def _listen(family: int, target: object, address: UnixAddress | TcpAddress) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)  # type: ignore[arg-type]
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise InvalidRequestError(f"cannot listen on {address}: {error.strerror or error}") from error
    return sock


def _remove_stale(path: str) -> None:
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


def address_of(listener: socket.socket) -> UnixAddress | TcpAddress:
    """Where a listening socket can be reached, with the port that was really bound."""
    name = listener.getsockname()
    return UnixAddress(str(name)) if listener.family == socket.AF_UNIX else TcpAddress(name[0], name[1])


def peer_of(sock: socket.socket) -> str:
    """Who is at the other end, for logs: an address, or the number of a local process."""
    try:
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            return f"unix:pid={_CREDENTIALS.unpack(credentials)[0]}"
        name = sock.getpeername()
        return str(TcpAddress(name[0], name[1]))
    except OSError:
        return "a client that is gone"


def tune(sock: socket.socket) -> None:
    """Non-blocking; small messages leave at once, large ones fit, a peer that vanished is noticed."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNIX_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)
