"""A generation, opened: the head, and its map as far as it has been read from the store.

Opening takes one round trip after the head: the root (when it is not inline) and the indexes of all segments
since, side by side; the segments then apply in the head's order. Pages of the map are read when somebody asks
about one of their chunks. Every part is verified against the digest one level up before it is believed.

The owner of a group keeps its manifest up to date with its own commits (`committed`), so that whoever reads through
it always resolves through the current map.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import numpy as np

from silo.abc import Buffer
from silo.errors import CorruptionError, InvalidRequestError
from silo.sync.committed import CommittedMap, Location, VolumeMap
from silo.sync.flight import SingleFlight
from silo.sync.head import Head, PartRef, SegmentRef, VolumeInfo
from silo.sync.mappage import Root, page_chunks_for, parse_page, parse_root
from silo.sync.reader import StoreReader
from silo.sync.segment import Index, parse_index
from silo.sync.tasks import task_group

__all__ = ["Manifest", "parse_index_of"]

INDEXES_AT_ONCE = 64
"""Indexes that are held in memory before they are applied: 2 MiB of full segments."""


def parse_index_of(segment: SegmentRef, data: Buffer) -> Index:
    """The index that a head speaks of."""
    digest = bytes.fromhex(segment.index_digest)
    return parse_index(data, index_offset=segment.index_offset, digest=digest)


class Manifest:
    """See the module. Made by `open`; `close` gives the space of the map back."""

    def __init__(self, head: Head, committed: CommittedMap, reader: StoreReader) -> None:
        self.head = head
        self.maps = committed
        self._reader = reader
        self._flights: SingleFlight[tuple[str, int, bool], None] = SingleFlight()

    @classmethod
    async def open(cls, head: Head, reader: StoreReader, *, directory: str | None = None) -> Manifest:
        """Read what is needed to resolve chunks of the generation that ``head`` shows.

        ``directory`` takes the map of a large disk, sparse and unlinked; on a tmpfs it counts as memory. Raises
        `CorruptionError`, `CapacityError`, and `UnavailableError` when the reader's patience is over.
        """
        committed = CommittedMap(directory)
        manifest = cls(head, committed, reader)
        try:
            await manifest._load()
        except BaseException:
            committed.close()
            raise
        return manifest

    async def _load(self) -> None:
        segments = self.head.segments
        root, indexes = await self._read_beginning(segments[:INDEXES_AT_ONCE])
        for volume in self.head.volumes:
            self.add(volume, root)
        for start in range(0, len(segments), INDEXES_AT_ONCE):
            some = segments[start : start + INDEXES_AT_ONCE]
            if start:
                _, indexes = await self._read_beginning(some, with_root=False)
            for segment, data in zip(some, indexes, strict=True):
                self.maps.apply(parse_index_of(segment, data), segment.key)

    async def _read_beginning(
        self, segments: Sequence[SegmentRef], *, with_root: bool = True
    ) -> tuple[Root | None, list[Buffer]]:
        """The root and some indexes, in one round trip."""
        root = self.head.root if with_root else None
        stored = root.stored if root else None
        async with task_group() as tasks:
            root_read = tasks.create_task(self._read_part(stored)) if stored else None
            index_reads = [
                tasks.create_task(self._read(part.key, part.index_offset, part.index_length, demand=True))
                for part in segments
            ]
        indexes = [read.result() for read in index_reads]
        if stored is not None and root_read is not None:
            return parse_root(root_read.result(), digest=bytes.fromhex(stored.digest)), indexes
        if root is not None and root.inline is not None:
            return parse_root(root.inline), indexes
        return None, indexes

    async def _read_part(self, part: PartRef, *, demand: bool = True) -> Buffer:
        return await self._read(part.key, part.offset, part.length, demand=demand)

    async def _read(self, key: str, offset: int, length: int, *, demand: bool) -> Buffer:
        data = await self._reader.read(key, offset, length, demand=demand)
        if data is None:
            raise CorruptionError(f"{key} is missing from the store")
        return data

    def add(self, volume: VolumeInfo, root: Root | None = None) -> None:
        """Add a volume; without a root that knows it, all of it is zero."""
        count = volume.geometry.chunk_count
        if root is not None and volume.name in root.page_chunks:
            self.maps.add(volume.name, count, root.page_chunks[volume.name], root.pages[volume.name])
        else:
            self.maps.add(volume.name, count, page_chunks_for(count))

    def close(self) -> None:
        """Give the space of the map back. Twice is harmless."""
        self.maps.close()

    # ---- resolving ----------------------------------------------------------------------------------------

    def volume(self, name: str) -> VolumeMap:
        """The map of a volume. `InvalidRequestError` when this generation has none of that name."""
        found = self.maps.volumes.get(name)
        if found is None:
            raise InvalidRequestError(
                f"generation {self.head.generation} of group {self.head.group} has no volume {name!r}",
                hint="it has " + ", ".join(self.maps.volumes),
            )
        return found

    async def locate(self, name: str, chunk: int, *, demand: bool) -> Location:
        """Where a chunk is, after reading its page of the map if need be. Raises as `load_page`."""
        volume = self.volume(name)
        while (location := volume.locate(chunk)) is None:
            (page,) = volume.pages_of(np.array([chunk]))
            await self.load_page(name, page, demand=demand)
        return location

    async def load_page(self, name: str, page: int, *, demand: bool) -> None:
        """Read and verify a page of the map; harmless when it is loaded. Concurrent calls share one request.

        `UnavailableError` as `StoreReader.read`, `CorruptionError` when the page is damaged or missing.
        Cancellation leaves nothing behind.
        """
        await self._flights.run((name, page, demand), lambda: self._load_page(name, page, demand))

    async def _load_page(self, name: str, page: int, demand: bool) -> None:
        volume = self.volume(name)
        if volume.loaded[page]:
            return
        part = volume.parts[page]
        data = await self._read_part(part, demand=demand)
        first, limit = volume.extent_of(page)
        digest = bytes.fromhex(part.digest)
        volume.install(parse_page(data, digest=digest, volume=name, page=page, entry_count=limit - first))

    # ---- the owner's commits --------------------------------------------------------------------------------

    async def committed(self, head: Head, segments: Iterable[tuple[SegmentRef, Index]]) -> None:
        """Take over a commit of our own: ``segments`` are those that it added, in order.

        Others run after each segment. The chunks of a commit were dirty, so nobody asks for them meanwhile.
        """
        self.head = head
        for segment, index in segments:
            self.maps.apply(index, segment.key)
            await asyncio.sleep(0)
