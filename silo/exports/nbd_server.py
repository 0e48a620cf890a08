"""The NBD server: listening sockets, the connections that came through them, and the end of both.

Exports are not its business: it hands every connection the catalogue (`silo.exports.nbd_exports`), which several
servers may share. Its tasks belong to the task group that the owner gives it; `aclose` returns when none of them
is left. No client can end more than its own connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import Final

import attrs

from silo.addresses import TcpAddress, UnixAddress, parse_address
from silo.exports.nbd_connection import NbdConnection
from silo.exports.nbd_exports import CONNECTIONS_MAX, NbdExports
from silo.exports.nbd_stream import Stream
from silo.exports.nbd_tls import NbdTls
from silo.exports.nbd_transmission import PayloadBudget, TransmissionLimits
from silo.exports.nbd_uri import NbdUri
from silo.sockets import address_of, listen_on, peer_of, tune

__all__ = ["NbdServer", "NbdServerSettings"]

logger = logging.getLogger(__name__)

_ACCEPT_PAUSE_S: Final = 0.1
"""Between two tries to accept when the process has no file descriptor left."""


@attrs.frozen
class NbdServerSettings:
    """Limits of one server."""

    handshake_timeout_s: float = 30.0
    """From the first byte to the choice of an export."""
    drain_timeout_s: float = 10.0
    """What requests in flight get when the server closes."""
    payload_bytes: int = 32 << 20
    """What all connections together hold of unfinished requests and unsent replies."""
    handshakes_max: int = 128
    """Connections that have not chosen an export yet; one more closes the oldest of them."""
    connections_max: int = CONNECTIONS_MAX
    """Of one export, through all servers that offer it; one more closes the oldest of them."""
    limits: TransmissionLimits = attrs.field(factory=TransmissionLimits)


class NbdServer:
    """See the module. ``tasks`` must outlive the server; `aclose` comes before the end of the group."""

    def __init__(
        self,
        exports: NbdExports,
        tasks: asyncio.TaskGroup,
        *,
        settings: NbdServerSettings | None = None,
        tls: NbdTls | None = None,
    ) -> None:
        self.exports = exports
        self.settings = settings or NbdServerSettings()
        self._tasks = tasks
        self.tls = tls
        self._budget = PayloadBudget(self.settings.payload_bytes)
        self._listeners: dict[socket.socket, asyncio.Task[None]] = {}
        self._paths: list[str] = []
        self._connections: dict[NbdConnection, asyncio.Task[None]] = {}

    @property
    def addresses(self) -> list[UnixAddress | TcpAddress]:
        """Where the server can be reached."""
        return [address_of(listener) for listener in self._listeners]

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    def uri(self, export: str = "") -> str:
        """How a client reaches an export through the first address."""
        return str(NbdUri(self.addresses[0], export, tls=self.tls is not None))

    def listen(self, where: str | socket.socket) -> UnixAddress | TcpAddress:
        """Accept clients at ``unix:/path`` or ``tcp:host:port``, or on a socket that is listening already.

        Returns the address with the port that was really bound. `InvalidRequestError` when it cannot be had.
        """
        if isinstance(where, str):
            listener = listen_on(parse_address(where))
            if listener.family == socket.AF_UNIX:
                self._paths.append(listener.getsockname())
        else:
            listener = where
            listener.setblocking(False)
        self._listeners[listener] = self._tasks.create_task(self._accept(listener))
        return address_of(listener)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except ConnectionAbortedError:
                continue  # the client left while it waited
            except OSError as error:
                logger.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self.welcome(sock)

    def welcome(self, sock: socket.socket) -> None:
        """Serve the client at the other end of a connected socket, which now belongs to the server."""
        tune(sock)
        undecided = [connection for connection in self._connections if not connection.is_serving]
        surplus = len(undecided) + 1 - self.settings.handshakes_max
        for oldest in undecided[: max(0, surplus)]:
            self._connections[oldest].cancel()
        connection = NbdConnection(
            Stream(sock),
            peer_of(sock),
            self.exports,
            self._budget,
            self.settings.limits,
            handshake_timeout_s=self.settings.handshake_timeout_s,
            tls=self.tls,
        )
        task = self._tasks.create_task(connection.run())
        self._connections[connection] = task
        task.add_done_callback(lambda _: self._forget(connection))

    def _forget(self, connection: NbdConnection) -> None:
        del self._connections[connection]
        connection.close()  # a task that is cancelled before its first step closes nothing itself

    async def aclose(self) -> None:
        """Accept nobody any more, drain every connection, close what is overdue. Twice is harmless.

        Cancelled, it leaves connections that are draining; call it again.
        """
        while self._listeners:
            listener, task = self._listeners.popitem()
            task.cancel()
            await asyncio.wait((task,))
            listener.close()
        while self._paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._paths.pop())
        for connection in list(self._connections):
            connection.drain()
        serving = [task for connection, task in self._connections.items() if connection.is_serving]
        if serving:
            await asyncio.wait(serving, timeout=self.settings.drain_timeout_s)
        left = list(self._connections.values())
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)  # bounded by the devices: requests in flight are cancelled
