"""Absent chunks: where they come from, and how they become present.

The middle part of a `silo.volume.Volume`. A chunk that is ABSENT_STORE or ABSENT_PEER is fetched from the source for
that residency, on demand or in the background, and filled (`silo.localchunks`), which never overwrites the guest.

**Hydration** is single-flight per chunk and urgency: whoever comes second waits for the first and shares its error.
Only a demand does not wait behind a background fetch, because it overtakes on the way.

**Invalidation** makes chunks absent again when the source of a migration has newer content. Whatever was being
fetched or filled then is older, however late it arrives: device phases are waited for, and fetches under way are
disowned.
"""

from __future__ import annotations

import asyncio

import attrs

from silo.abc import BlockDevice, Buffer, ChunkSource
from silo.chunkmap import LOCKED, RESIDENCY_MASK, ChunkMap, Residency
from silo.errors import InvariantError, SiloError
from silo.gate import Gate
from silo.geometry import Geometry
from silo.heatmap import HeatMap
from silo.localchunks import PRESENT, ZERO, LocalChunks, MapKeeper

__all__ = ["Hydration"]

HYDRATE_WINDOW = 16
"""Chunks that one guest request hydrates at a time."""


@attrs.define(eq=False)
class _Flight:
    """A fetch under way, for all who wait for it."""

    landed: asyncio.Event = attrs.field(factory=asyncio.Event)
    error: SiloError | None = None


class Hydration(LocalChunks):
    """See the module."""

    def __init__(
        self,
        name: str,
        device: BlockDevice,
        geometry: Geometry,
        gate: Gate,
        *,
        chunks: ChunkMap | None = None,
        heat: HeatMap | None = None,
        keeper: MapKeeper | None = None,
    ) -> None:
        super().__init__(name, device, geometry, gate, chunks=chunks, heat=heat, keeper=keeper)
        self._sources: dict[int, ChunkSource] = {}
        self._flights: dict[tuple[int, bool], _Flight] = {}

    def set_source(self, residency: Residency, source: ChunkSource | None) -> None:
        """Where absent chunks of this residency come from."""
        if source is None:
            self._sources.pop(residency, None)
        else:
            self._sources[residency] = source

    async def hydrate(self, chunk: int, *, demand: bool = False) -> None:
        """Make a chunk known locally, through the source for its residency. Harmless when it is.

        Concurrent calls share one fetch and its error; only a demand does not wait behind a background fetch
        but does its own. Raises what the source raises. Cancellation leaves the chunk as it was and lets
        another waiter fetch.
        """
        while (state := self._states[chunk]) & RESIDENCY_MASK < ZERO:
            flight = self._flights.get((chunk, True)) or self._flights.get((chunk, demand))
            if state & LOCKED:
                await self._locks.wait(chunk)
            elif flight is None:
                await self._fetch(chunk, demand)
            else:
                await flight.landed.wait()  # it ends when its caller does
                if flight.error is not None:
                    raise flight.error

    async def _fetch(self, chunk: int, demand: bool) -> None:
        residency = self._states[chunk] & RESIDENCY_MASK
        source = self._sources.get(residency)
        if source is None:
            raise InvariantError(f"chunk {chunk} of {self.name} is absent, and nothing can provide it")
        key = (chunk, demand)
        flight = self._flights[key] = _Flight()
        try:
            content = await source.fetch(self.name, chunk, demand=demand)
            if self._flights.get(key) is flight and self._states[chunk] & RESIDENCY_MASK == residency:
                await self.fill(chunk, content)
        except SiloError as error:
            flight.error = error
            raise
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
            flight.landed.set()

    async def _hydrate_all(self, first: int, limit: int, *, demand: bool) -> None:
        absent = [c for c in range(first, limit) if self._states[c] & RESIDENCY_MASK < ZERO]
        if len(absent) == 1:
            return await self.hydrate(absent[0], demand=demand)
        todo = iter(absent)

        async def work() -> None:
            for chunk in todo:
                await self.hydrate(chunk, demand=demand)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in absent[:HYDRATE_WINDOW]:
                    tasks.create_task(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def invalidate(self, first: int, limit: int, residency: Residency) -> None:
        """Target of a migration, before the claim: the source has newer content of these chunks.

        Waits for the device phases on them. From its return on, no fetch or fill that began before has an
        effect. Cancelled, it has done nothing.
        """
        if residency not in (Residency.ABSENT_PEER, Residency.ABSENT_STORE):
            raise InvariantError(f"a chunk cannot be invalidated to {residency.name}")
        while (busy := self._locks.busy(first, limit)) is not None:
            await self._locks.wait(busy)
        if self.cut is not None:
            raise InvariantError(f"chunks of {self.name} were invalidated during a cut")
        self.chunks.set_residency_run(first, limit, residency)
        self._checkpoint_due = True
        for key in [key for key in self._flights if first <= key[0] < limit]:
            del self._flights[key]

    async def read_chunk(self, chunk: int) -> Buffer | None:
        """The current content, as bytes that nobody will change; ``None`` when it is all zeros.

        Not held back by the gate: after the switchover the source still serves. Hydrates an absent chunk.
        """
        await self.hydrate(chunk)
        offset, length = self.geometry.extent_of(chunk)
        if self._states[chunk] & RESIDENCY_MASK != PRESENT:
            return None
        live = self.device.read_nowait(offset, length)
        return bytes(live) if live is not None else await self.device.read(offset, length)
