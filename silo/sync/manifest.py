"""A generation, opened: the head, and its map as far as it has been read from the store.

The root is in the head, or a round trip away when it is large. Then come the indexes of all segments since the root,
which apply in the head's order, and pages of the map, each when somebody first asks about one of its chunks. The
first question takes one round trip for both. Every part is verified against the digest one level up before it is
believed.

The owner of a group keeps its manifest up to date with its own commits (`committed`), so that whoever reads through
it always resolves through the current map.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np

from silo.abc import Buffer
from silo.errors import CorruptionError, InvalidRequestError
from silo.sync.cipher import KeyRing, check_keys
from silo.sync.committed import CommittedMap, Location, VolumeMap
from silo.sync.flight import SingleFlight
from silo.sync.head import Head, PartRef, SegmentRef, VolumeInfo
from silo.sync.mappage import Root, page_chunks_for, parse_page, parse_root
from silo.sync.reader import StoreReader
from silo.sync.segment import Index, parse_index
from silo.tasks import task_group

__all__ = ["Manifest", "parse_index_of"]

INDEXES_AT_ONCE = 64
"""Indexes that are held in memory before they are applied: 2 MiB of full segments."""


def parse_index_of(segment: SegmentRef, data: Buffer, reader: StoreReader) -> Index:
    """The index that a head speaks of, as it was read by this reader."""
    part = PartRef(segment.key, segment.index_offset, segment.index_length, segment.index_digest)
    opened, digest = reader.unseal(data, part)
    return parse_index(
        opened, index_offset=segment.index_offset, digest=digest, encrypted=reader.keys is not None
    )


class Manifest:
    """See the module. Made by `open`; `close` gives the space of the map back."""

    def __init__(self, head: Head, committed: CommittedMap, reader: StoreReader) -> None:
        self.head = head
        self.maps = committed
        self._reader = reader
        self._unapplied = head.segments
        self._completing: SingleFlight[None, None] = SingleFlight()
        self._loading: SingleFlight[tuple[str, int, bool], None] = SingleFlight()

    @classmethod
    async def open(
        cls, head: Head, reader: StoreReader, *, directory: str | None = None, complete: bool = True
    ) -> Manifest:
        """Read what is needed to resolve chunks of the generation that ``head`` shows.

        Without ``complete`` the indexes of the segments since the root are left for the first question, which then
        reads them beside its page. ``directory`` takes the map of a large disk, sparse and unlinked; on a tmpfs it
        counts as memory. Raises as `complete`.
        """
        check_keys(head.group, head.keys, reader.keys)
        committed = CommittedMap(directory)
        manifest = cls(head, committed, reader)
        try:
            root = await manifest._read_root()
            for volume in head.volumes:
                manifest.add(volume, root)
            if complete:
                await manifest.complete()
        except BaseException:
            committed.close()
            raise
        return manifest

    @property
    def keys(self) -> KeyRing | None:
        """The master keys, when the group is encrypted."""
        return self._reader.keys

    @property
    def is_complete(self) -> bool:
        """Whether all segments since the root are applied. Before, the maps must not be asked directly."""
        return not self._unapplied

    async def complete(self) -> None:
        """Read and apply the indexes of the segments since the root; harmless when that is done.

        `CorruptionError`, `CapacityError`, and `UnavailableError` when the reader's patience is over; then, and after
        a cancellation, the next call goes on from there. Concurrent calls share the work.
        """
        if self._unapplied:
            await self._completing.run(None, self._complete)

    async def _complete(self) -> None:
        while segments := self._unapplied[:INDEXES_AT_ONCE]:
            async with task_group() as tasks:
                reads = [
                    tasks.create_task(self._read(part.key, part.index_offset, part.index_length, demand=True))
                    for part in segments
                ]
            for segment, read in zip(segments, reads, strict=True):
                self.maps.apply(parse_index_of(segment, read.result(), self._reader), segment.key)
            self._unapplied = self._unapplied[INDEXES_AT_ONCE:]

    async def _read_root(self) -> Root | None:
        root = self.head.root
        if root is None:
            return None
        if root.stored is None:
            return parse_root(root.inline or b"")
        data, digest = await self._read_part(root.stored)
        return parse_root(data, digest=digest)

    async def _read_part(self, part: PartRef, *, demand: bool = True) -> tuple[Buffer, bytes]:
        """A part, and the digest that it must have."""
        data = await self._read(part.key, part.offset, part.length, demand=demand)
        return self._reader.unseal(data, part)

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
        """Where a chunk is, after reading what is needed for that. Raises as `complete` and `load_page`."""
        volume = self.volume(name)
        if not self.is_complete:
            # Page and indexes side by side; which is taken over first makes no difference.
            async with task_group() as tasks:
                tasks.create_task(self.complete())
                for page in volume.pages_of(np.array([chunk])):
                    tasks.create_task(self.load_page(name, page, demand=demand))
        while (location := volume.locate(chunk)) is None:
            (page,) = volume.pages_of(np.array([chunk]))
            await self.load_page(name, page, demand=demand)
        return location

    async def load_page(self, name: str, page: int, *, demand: bool) -> None:
        """Read and verify a page of the map; harmless when it is loaded. Concurrent calls share one request.

        `UnavailableError` as `StoreReader.read`, `CorruptionError` when the page is damaged or missing.
        Cancellation leaves nothing behind.
        """
        await self._loading.run((name, page, demand), lambda: self._load_page(name, page, demand))

    async def _load_page(self, name: str, page: int, demand: bool) -> None:
        volume = self.volume(name)
        if volume.loaded[page]:
            return
        part = volume.parts[page]
        data, digest = await self._read_part(part, demand=demand)
        first, limit = volume.extent_of(page)
        found = parse_page(
            data,
            digest=digest,
            volume=name,
            page=page,
            entry_count=limit - first,
            encrypted=self.keys is not None,
        )
        volume.install(found)

    # ---- the owner's commits --------------------------------------------------------------------------------

    async def committed(self, head: Head, segments: Iterable[tuple[SegmentRef, Index]]) -> None:
        """Take over a commit of our own: ``segments`` are those that it added, in order.

        Others run after each segment. The chunks of a commit were dirty, so nobody asks for them meanwhile.
        """
        self.head = head
        for segment, index in segments:
            self.maps.apply(index, segment.key)
            await asyncio.sleep(0)
