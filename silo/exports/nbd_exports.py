"""Which volumes can be reached over NBD, under which names, and by which connections.

An export is called ``<group>/<volume>``. While that is unambiguous, the bare name of the volume is an alias, and
the empty name means the only export there is.

`NbdExports` is the catalogue that all servers (a Unix socket, a TCP port) of a host share, because what an
`NbdExport` watches over must see every connection to its volume:

* a limit on their number: one too many, and the oldest is closed;
* reconnecting clients. A client that lost its connection repeats on a new one what was not answered. An old
  write that is still in a socket's buffer, or still waiting in a task, must not land over what the client
  writes next. So before the first request of a new connection runs, every older one has served the bytes that
  had arrived, and the changes that they asked for have ended; one that cannot do so in time is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from silo.errors import InvalidRequestError
from silo.exports.nbd_catalog import ExportInfo
from silo.exports.nbd_contexts import CONTEXT_NAMES
from silo.exports.nbd_options import BlockSizes
from silo.exports.nbd_wire import PAYLOAD_SIZE_DEFAULT
from silo.volume import Volume

__all__ = ["ExportConnection", "NbdExport", "NbdExports"]

CONNECTIONS_MAX = 128
"""Per export. QEMU opens up to 16, the Linux kernel as many as it is told to."""
SETTLE_TIMEOUT_S = 30.0
"""What an older connection may take to finish before it is closed: the patience of Linux's own clients."""


class ExportConnection(Protocol):
    """What an export asks of its connections."""

    async def settle(self) -> None:
        """Return when nothing that has arrived by now can still change the volume."""

    def abort(self) -> None:
        """End now, without finishing anything."""

    def drain(self) -> None:
        """Finish what is in flight, refuse the rest, end."""

    async def wait_closed(self) -> None:
        """Return when nothing of the connection is left."""


class NbdExport:
    """One volume as clients see it. ``block_size`` is the smallest unit that requests must keep to."""

    def __init__(
        self,
        name: str,
        volume: Volume,
        *,
        read_only: bool = False,
        description: str = "",
        flush: Callable[[], Awaitable[None]] | None = None,
        block_size: int = 1,
        payload_max: int = PAYLOAD_SIZE_DEFAULT,
        connections_max: int = CONNECTIONS_MAX,
        settle_timeout_s: float = SETTLE_TIMEOUT_S,
    ) -> None:
        self.name = name
        self.volume = volume
        self.read_only = read_only or volume.read_only
        self.description = description
        self.flush = flush or volume.flush
        """What a flush of any connection waits for; it covers the acknowledged writes of all of them."""
        self.sizes = BlockSizes(block_size, max(4096, block_size), payload_max)
        self._connections_max = connections_max
        self._settle_timeout_s = settle_timeout_s
        self._connections: dict[ExportConnection, None] = {}

    @property
    def info(self) -> ExportInfo:
        """What clients are told. The size is that of this moment: volumes can grow."""
        return ExportInfo(
            name=self.name,
            size=self.volume.geometry.size,
            sizes=self.sizes,
            read_only=self.read_only,
            description=self.description,
            contexts=CONTEXT_NAMES,
        )

    @property
    def connections(self) -> Sequence[ExportConnection]:
        """Oldest first."""
        return tuple(self._connections)

    async def admit(self, connection: ExportConnection) -> None:
        """Return when the first request of a new connection may run; `dismiss` must follow, also after an error."""
        older = self.connections
        self._connections[connection] = None
        surplus = len(self._connections) - self._connections_max
        for evicted in older[: max(0, surplus)]:
            evicted.abort()
        async with asyncio.TaskGroup() as tasks:
            for other in older:
                tasks.create_task(self._settle(other))

    async def _settle(self, other: ExportConnection) -> None:
        try:
            async with asyncio.timeout(self._settle_timeout_s):
                await other.settle()
        except TimeoutError:
            other.abort()
            await other.wait_closed()  # bounded by the device: requests in flight are cancelled

    def dismiss(self, connection: ExportConnection) -> None:
        """The connection has ended."""
        self._connections.pop(connection, None)


class NbdExports:
    """The catalogue. Empty at first; exports come and go while servers run."""

    def __init__(self) -> None:
        self._exports: dict[str, NbdExport] = {}

    def add(self, export: NbdExport) -> None:
        """Offer an export from now on. `InvalidRequestError` when the name is taken."""
        if export.name in self._exports:
            raise InvalidRequestError(f"an export {export.name!r} exists already")
        self._exports[export.name] = export

    async def remove(self, name: str, *, drain_timeout_s: float = 10.0) -> None:
        """Offer an export no longer, and return when its connections have ended: drained, or closed when overdue."""
        export = self._exports.pop(name, None)
        if export is None:
            return
        for connection in export.connections:
            connection.drain()
        try:
            async with asyncio.timeout(drain_timeout_s):
                for connection in export.connections:
                    await connection.wait_closed()
        except TimeoutError:
            for connection in export.connections:
                connection.abort()
                await connection.wait_closed()  # bounded by the device: requests in flight are cancelled

    def get(self, name: str) -> NbdExport | None:
        """The export that a client means by a name, an alias or nothing at all."""
        exact = self._exports.get(name)
        if exact is not None:
            return exact
        candidates = [export for export in self._exports.values() if not name or _leaf(export.name) == name]
        return candidates[0] if len(candidates) == 1 else None

    def find(self, name: str) -> ExportInfo | None:
        """As `get`, for the handshake."""
        export = self.get(name)
        return None if export is None else export.info

    def listed(self) -> Sequence[ExportInfo]:
        """All exports under their canonical names."""
        return [export.info for export in self._exports.values()]


def _leaf(name: str) -> str:
    """The volume's part of ``<group>/<volume>``."""
    return name.rpartition("/")[2]
