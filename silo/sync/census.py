"""What generations reach: the keys that the head, and each record, still need, and how much of each object.

For the owner's newest generation the map in memory says it exactly, page by page as far as it is loaded. For pages
that are not loaded, and for records, the pages in the store say it: a page brings the keys that its entries name. That
may name an object whose every chunk was overwritten by a later segment; so what comes out here is what is reached, or
more, never less.

Pages are immutable, so each is read once and remembered by its digest, as a few numbers per object.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from silo.abc import Buffer
from silo.errors import CorruptionError
from silo.sync.codec import Kind
from silo.sync.committed import VolumeMap
from silo.sync.head import Head, PartRef
from silo.sync.manifest import Manifest
from silo.sync.mappage import Root, Slots, page_count, parse_page, parse_root
from silo.sync.reader import StoreReader
from silo.sync.segment import ENTRY

__all__ = ["Census"]

STEP = 1 << 14
"""Slots looked at between two turns of the guests: below a millisecond."""

PAGES_REMEMBERED = 1 << 13
"""Pages whose keys are kept in memory: 32 generations of a volume of which every page changes."""


class Census:
    """See the module. One call at a time."""

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader
        self._pages: dict[str, dict[str, int]] = {}
        self._records: dict[str, frozenset[str]] = {}

    async def newest(self, manifest: Manifest) -> Counter[str]:
        """The live bytes (payloads with their entries in the index) of each object that the owner's newest generation
        reaches; 0 for those that are reached without a chunk.

        Commits may go on meanwhile; what comes out is then what was reached all the while, and what the generation at
        the return reaches of keys that are older than the call. Raises as `Manifest.load_page`.
        """
        await manifest.complete()
        live: Counter[str] = Counter()
        for name, volume in list(manifest.maps.volumes.items()):
            for page in range(volume.page_total):
                was_loaded = bool(volume.loaded[page])
                for low, high in _steps(*volume.extent_of(page)):
                    _count(live, volume, low, high)
                    await asyncio.sleep(0)
                if not was_loaded and (part := volume.parts.get(page)) is not None:
                    first, limit = volume.extent_of(page)
                    live.update(await self._page(name, page, part, limit - first))
        for key in _named_by(manifest.head):
            live[key] += 0
        for volume in manifest.maps.volumes.values():
            for part in volume.parts.values():
                live[part.key] += 0
        return live

    async def record(self, key: str, record: Head) -> frozenset[str]:
        """The keys that a record reaches. Remembered until `forget_all_but`. Raises as `Manifest.load_page`."""
        if key not in self._records:
            found = set(_named_by(record))
            root = await self._root(record)
            for volume in record.volumes:
                if root is None or volume.name not in root.page_chunks:
                    continue
                size, count = root.page_chunks[volume.name], volume.geometry.chunk_count
                for page, part in root.pages[volume.name].items():
                    if page >= page_count(count, size):
                        raise CorruptionError(f"{key} names a page behind the end of a volume")
                    entries = min(size, count - page * size)
                    found.add(part.key)
                    found.update(await self._page(volume.name, page, part, entries))
            self._records[key] = frozenset(found)
        return self._records[key]

    def forget_all_but(self, records: Iterable[str]) -> None:
        """Only these records exist any more."""
        wanted = set(records)
        for key in self._records.keys() - wanted:
            del self._records[key]

    async def _root(self, head: Head) -> Root | None:
        if head.root is None:
            return None
        if head.root.stored is None:
            return parse_root(head.root.inline or b"")
        data, digest = await self._read(head.root.stored)
        return parse_root(data, digest=digest)

    async def _page(self, volume: str, page: int, part: PartRef, entries: int) -> dict[str, int]:
        known = self._pages.pop(part.digest, None)
        if known is None:
            data, digest = await self._read(part)
            found = parse_page(
                data,
                digest=digest,
                volume=volume,
                page=page,
                entry_count=entries,
                encrypted=self._reader.keys is not None,
            )
            sizes = _sizes(found.slots, len(found.keys))
            known = dict(zip(found.keys, sizes, strict=True))
            await asyncio.sleep(0)
        self._pages[part.digest] = known  # at the end, away from those that are dropped first
        if len(self._pages) > PAGES_REMEMBERED:
            del self._pages[next(iter(self._pages))]
        return known

    async def _read(self, part: PartRef) -> tuple[Buffer, bytes]:
        """A part, and the digest that it must have."""
        data = await self._reader.read(part.key, part.offset, part.length, demand=False)
        if data is None:
            raise CorruptionError(f"{part.key} is missing from the store")
        return self._reader.unseal(data, part)


def _named_by(head: Head) -> Iterator[str]:
    """The keys that a head names itself."""
    yield from (segment.key for segment in head.segments)
    if head.root is not None and head.root.stored is not None:
        yield head.root.stored.key
    for part in (head.hot, head.resume):
        if part is not None:
            yield part.key


def _steps(first: int, limit: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + STEP, limit)) for low in range(first, limit, STEP))


def _sizes(slots: Slots, keys: int) -> list[int]:
    paid = (slots["kind"] == Kind.RAW) | (slots["kind"] == Kind.ZSTD)
    numbers = slots["segment"][paid]
    sizes = slots["length"][paid].astype(np.float64) + ENTRY.itemsize
    return [int(size) for size in np.bincount(numbers, weights=sizes, minlength=keys)]


def _count(live: Counter[str], volume: VolumeMap, low: int, high: int) -> None:
    for number, size in enumerate(_sizes(volume.slots(low, high), 0)):
        if size:
            live[volume.key(number)] += size
