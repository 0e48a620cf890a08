"""The NBD side of a host: one server per address, one catalogue of exports for all of them.

Exports are called ``<group>/<volume>``. Servers live as long as the host; exports come and go with their groups.
"""

from __future__ import annotations

import asyncio
from functools import partial

import attrs

from silo.errors import InvalidRequestError
from silo.exports.nbd_exports import NbdExport, NbdExports
from silo.exports.nbd_server import NbdServer, NbdServerSettings
from silo.exports.nbd_tls import NbdTls
from silo.flushing import StoreFlush
from silo.group import Group

__all__ = ["Exporter", "GroupExport"]


@attrs.frozen
class GroupExport:
    """A group at an address."""

    group: str
    volumes: tuple[str, ...]
    server: NbdServer

    def uri(self, volume: str = "") -> str:
        """How a client reaches a volume; without a name, the only one of the group."""
        name = volume or (self.volumes[0] if len(self.volumes) == 1 else "")
        return self.server.uri(f"{self.group}/{name}" if name else "")


class Exporter:
    """See the module. Belongs to the host's event loop."""

    def __init__(self, tasks: asyncio.TaskGroup, settings: NbdServerSettings | None = None) -> None:
        self._tasks = tasks
        self._settings = settings or NbdServerSettings()
        self._exports = NbdExports()
        self._servers: dict[str, NbdServer] = {}
        self._groups: dict[str, list[GroupExport]] = {}

    def add(
        self, group: Group, url: str, tls: NbdTls | None = None, flush: StoreFlush | None = None
    ) -> GroupExport:
        """Serve a group's volumes at ``unix:/path`` or ``tcp:host:port``. The same address twice is harmless.

        ``flush`` is what makes flushes reach the store; it is the same at all addresses of a group, because a flush
        covers the writes of all connections. `InvalidRequestError` when it is not, when the address cannot be had,
        or when it is served already with other certificates.
        """
        description = f"flushes are durable {'in the store' if flush else 'on the local disk'}"
        for name in group.volumes:
            other = self._exports.get(f"{group.name}/{name}")
            if other is not None and other.description != description:
                raise InvalidRequestError(
                    f"group {group.name} is exported already, and its {other.description}",
                    hint="give all of its exports the same flush",
                )
        server = self._servers.get(url)
        if server is None:
            server = NbdServer(self._exports, self._tasks, settings=self._settings, tls=tls)
            server.listen(url)
            self._servers[url] = server
        elif server.tls is not tls:
            raise InvalidRequestError(
                f"{url} is served with other TLS settings",
                hint="give both groups the same, or take another address",
            )
        for name, volume in group.volumes.items():
            full = f"{group.name}/{name}"
            if self._exports.get(full) is None:
                self._exports.add(
                    NbdExport(
                        full,
                        volume,
                        description=description,
                        flush=partial(flush.flush, volume) if flush else None,
                        connections_max=self._settings.connections_max,
                    )
                )
        exports = self._groups.setdefault(group.name, [])
        for export in exports:
            if export.server is server:
                return export
        export = GroupExport(group.name, tuple(group.volumes), server)
        exports.append(export)
        return export

    def uris(self, group: str, volume: str) -> list[str]:
        """Every address of a volume."""
        return [export.uri(volume) for export in self._groups.get(group, [])]

    def first_uris(self, group: str) -> dict[str, str]:
        """Volume name to its first address, as a workload's hooks get them."""
        exports = self._groups.get(group, [])
        return {name: exports[0].uri(name) for name in exports[0].volumes} if exports else {}

    async def remove(self, group: str) -> None:
        """Stop serving a group: finish what is in flight, refuse the rest, close its connections."""
        exports = self._groups.pop(group, [])
        for name in exports[0].volumes if exports else ():
            await self._exports.remove(f"{group}/{name}")

    async def aclose(self) -> None:
        """Stop serving everything."""
        for server in self._servers.values():
            await server.aclose()
        self._servers.clear()
