"""The committed map in memory: for every chunk of every volume, where the newest generation keeps it.

The slots are in sparse files (see `silo.sync.slots`), because 56 bytes per chunk would not fit into memory for large
disks.

A page of the map is *loaded* when all of its slots are known. In a loaded page the kind 0 means zero; in another
one it means that only the store knows. Entries of segments since the root are applied whether the page is loaded
or not, and win over the page when it is loaded later. A page is *changed* when the store's copy of it is not
what the slots say; a checkpoint writes those.

Keys of segments are counted: one that no slot refers to is forgotten, so a map that is committed to for years
does not grow.

This is memory only. Reading pages from the store is `silo.sync.manifest`'s business. One event loop, no awaits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import attrs
import numpy as np
import numpy.typing as npt

from silo.chunkmap import Indices
from silo.errors import CorruptionError, InvariantError
from silo.sync.codec import DIGEST_SIZE, Kind
from silo.sync.head import PartRef
from silo.sync.mappage import SLOT, Page, Slots, page_count
from silo.sync.segment import Entries, Index
from silo.sync.slots import SparseSlots

__all__ = ["CommittedMap", "KeyTable", "Location", "VolumeMap"]


PAGES_MAX = 1 << 16
"""We write at most 256 pages per volume; a volume that grows may get more."""


@attrs.frozen
class Location:
    """Where the content of one chunk is. ``key`` is empty for the kinds without a payload."""

    kind: Kind
    key: str
    offset: int
    length: int
    digest: bytes


ZERO = Location(Kind.ZERO, "", 0, 0, b"")


class KeyTable:
    """Numbers for keys, and how many slots refer to each. A number is used again when nothing refers to it."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._keys: list[str] = []
        self._counts: npt.NDArray[np.int64] = np.zeros(16, dtype=np.int64)
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, key: str, count: int) -> int:
        """``count`` (at least one) more slots refer to a key. Returns its number, valid while any slot does."""
        number = self._numbers.get(key)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._keys[number] = key
            else:
                number = len(self._keys)
                self._keys.append(key)
                if number == len(self._counts):
                    self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._numbers[key] = number
        self._counts[number] += count
        return number

    def key(self, number: int) -> str:
        """The key behind a number."""
        return self._keys[number]

    def drop(self, numbers: npt.NDArray[np.uint32]) -> None:
        """One slot less refers to each of these (a number may occur many times)."""
        if not len(numbers):
            return
        for number, count in zip(*np.unique(numbers, return_counts=True), strict=True):
            self._counts[number] -= count
            if self._counts[number] < 0:
                raise InvariantError("a segment lost more references than it had")
            if self._counts[number] == 0:
                del self._numbers[self._keys[number]]
                self._keys[number] = ""
                self._free.append(int(number))


class VolumeMap:
    """The slots of one volume. Without ``parts`` every chunk is known, and zero."""

    def __init__(
        self,
        chunk_count: int,
        page_chunks: int,
        keys: KeyTable,
        *,
        parts: Mapping[int, PartRef] | None = None,
        directory: str | None = None,
    ) -> None:
        pages = page_count(chunk_count, page_chunks)
        if pages > PAGES_MAX:
            raise CorruptionError(f"the root of the map divides a volume into {pages} pages")
        self.chunk_count = chunk_count
        self.page_chunks = page_chunks
        self.parts = dict(parts or {})
        """Where the store has the pages that are not all zero, as of the root."""
        if any(page >= pages for page in self.parts):
            raise CorruptionError("the root of the map names a page behind the end of a volume")
        self.loaded: npt.NDArray[np.bool_] = np.ones(pages, dtype=np.bool_)
        self.loaded[list(self.parts)] = False
        self.changed: npt.NDArray[np.bool_] = np.zeros(pages, dtype=np.bool_)
        self._keys = keys
        self._shift = page_chunks.bit_length() - 1
        self._slots = SparseSlots(chunk_count, directory)

    @property
    def page_total(self) -> int:
        """How many pages the volume has."""
        return len(self.loaded)

    @property
    def file_bytes(self) -> int:
        """What the slots occupy in the file system, in memory or on disk as the kernel sees fit."""
        return self._slots.file_bytes

    def close(self) -> None:
        """Give the space back. Questions about chunks raise `ClosedError` afterwards."""
        self._slots.close()

    # ---- asking -------------------------------------------------------------------------------------------

    def pages_of(self, chunks: Indices) -> list[int]:
        """The pages that hold these chunks and are not loaded."""
        pages = np.unique(chunks >> self._shift)
        return [int(page) for page in pages[~self.loaded[pages]]]

    def extent_of(self, page: int) -> tuple[int, int]:
        """``(first, limit)`` of the chunks of a page."""
        return page << self._shift, min((page + 1) << self._shift, self.chunk_count)

    def locate(self, chunk: int) -> Location | None:
        """Where a chunk is; ``None`` when its page must be loaded first."""
        slot = self._slots.get(chunk)
        kind = 0 if slot is None else int(slot["kind"])
        if slot is None or kind in (0, Kind.ZERO):
            return ZERO if kind or self.loaded[chunk >> self._shift] else None
        key = self._keys.key(int(slot["segment"])) if kind != Kind.INHERIT else ""
        return Location(Kind(kind), key, int(slot["offset"]), int(slot["length"]), slot["digest"].tobytes())

    def slots(self, first: int, limit: int) -> Slots:
        """A copy of the slots of chunks whose pages are loaded, with `Kind.ZERO` written out."""
        copy = self._slots.read(first, limit)
        copy["kind"][copy["kind"] == 0] = Kind.ZERO
        return copy

    def key(self, segment: int) -> str:
        """The key behind the number in a slot."""
        return self._keys.key(segment)

    def digests(self, chunks: Indices) -> list[bytes | None]:
        """The digest of each chunk that has a payload; ``None`` for one that has none, or is not known."""
        found = self._slots.gather(chunks)
        paid = (found["kind"] == Kind.RAW) | (found["kind"] == Kind.ZSTD)
        raw = found["digest"].tobytes()
        return [
            raw[at : at + DIGEST_SIZE] if has_one else None
            for at, has_one in zip(range(0, len(raw), DIGEST_SIZE), paid.tolist(), strict=True)
        ]

    def is_zero(self, first: int, limit: int) -> bool:
        """Whether all chunks of a run are known to be zero."""
        return all(bool(self._zeros(page, low, high).all()) for page, low, high in self._split(first, limit))

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """``(first, limit, stored)`` over the whole volume; ``stored`` is false for what is known to be zero."""
        for page, first, limit in self._split(0, self.chunk_count):
            zero = self._zeros(page, first, limit)
            edges = [0, *(np.flatnonzero(np.diff(zero)) + 1).tolist(), len(zero)]
            for low, high in pairwise(edges):
                stop = limit if high == len(zero) else first + high
                yield first + low, stop, not zero[low]

    def _zeros(self, page: int, first: int, limit: int) -> npt.NDArray[np.bool_]:
        """Which chunks of a run in one page are known to be zero; one value when all are alike for lack of slots."""
        if self._slots.is_hole(first, limit):
            return self.loaded[page : page + 1]
        kinds = self._slots.kinds(first, limit)
        zero: npt.NDArray[np.bool_] = (kinds == Kind.ZERO) | ((kinds == 0) & self.loaded[page])
        return zero

    def _split(self, first: int, limit: int) -> Iterator[tuple[int, int, int]]:
        """``(page, first, limit)`` for each page that a run touches."""
        for page in range(first >> self._shift, ((limit - 1) >> self._shift) + 1):
            low, high = self.extent_of(page)
            yield page, max(first, low), min(limit, high)

    # ---- changing -----------------------------------------------------------------------------------------

    def reserve(self, chunks: Indices) -> None:
        """Make sure that entries for these chunks can be stored. `CapacityError` when the disk is full."""
        self._slots.reserve(chunks)

    def apply(self, entries: Entries, key: str) -> None:
        """Take over the entries of the index of the segment ``key`` for this volume."""
        limit = entries["chunk"].astype(np.int64) + entries["count"]
        if len(limit) and int(limit.max()) > self.chunk_count:
            raise CorruptionError("an index names chunks behind the end of a volume")
        paid = (entries["kind"] == Kind.RAW) | (entries["kind"] == Kind.ZSTD)
        self._apply_chunks(entries[paid], key)
        for entry in entries[~paid]:
            first = int(entry["chunk"])
            self._apply_run(first, first + int(entry["count"]), entry)

    def _apply_chunks(self, entries: Entries, key: str) -> None:
        if not len(entries):
            return
        chunks = entries["chunk"].astype(np.int64)
        self.reserve(chunks)
        slots = np.zeros(len(entries), dtype=SLOT)
        for field in ("kind", "offset", "length", "key_id", "digest"):
            slots[field] = entries[field]
        slots["segment"] = self._keys.add(key, len(slots))
        self._forget(self._slots.gather(chunks))
        self._slots.put(chunks, slots)
        self.changed[np.unique(chunks >> self._shift)] = True

    def _apply_run(self, first: int, limit: int, entry: np.void) -> None:
        value = np.zeros(1, dtype=SLOT)
        value["kind"], value["digest"] = entry["kind"], entry["digest"]
        is_zero = int(entry["kind"]) == Kind.ZERO
        for page, low, high in self._split(first, limit):
            if is_zero and self.is_zero(low, high):
                continue
            self._forget(self._slots.read(low, high))
            # In a loaded page nothing means zero. A whole page of zeros need never be loaded any more.
            if is_zero and (self.loaded[page] or (low, high) == self.extent_of(page)):
                self._slots.clear(low, high)
                self.loaded[page] = True
            else:
                self._slots.fill(low, high, value)
            self.changed[page] = True

    def _forget(self, slots: Slots) -> None:
        """These slots are about to be overwritten."""
        paid = (slots["kind"] == Kind.RAW) | (slots["kind"] == Kind.ZSTD)
        self._keys.drop(slots["segment"][paid])

    def install(self, page: Page) -> None:
        """Take over a page that was read from the store, except where newer entries are known already."""
        if self.loaded[page.page]:
            return
        first, limit = self.extent_of(page.page)
        wanted = np.flatnonzero((page.slots["kind"] != Kind.ZERO) & (self._slots.kinds(first, limit) == 0))
        self._slots.reserve(wanted + first)
        slots = page.slots[wanted]
        paid = (slots["kind"] == Kind.RAW) | (slots["kind"] == Kind.ZSTD)
        counts = np.bincount(slots["segment"][paid], minlength=len(page.keys))
        translation = np.zeros(max(1, len(page.keys)), dtype=np.uint32)
        for local, (key, count) in enumerate(zip(page.keys, counts.tolist(), strict=True)):
            if count:
                translation[local] = self._keys.add(key, count)
        slots["segment"] = np.where(paid, translation[slots["segment"]], 0)
        self._slots.put(wanted + first, slots)
        self.loaded[page.page] = True

    def render(self, volume: str, page: int) -> Page | None:
        """The page as a checkpoint writes it; ``None`` when all of it is zero. It must be loaded."""
        if not self.loaded[page]:
            raise InvariantError(f"page {page} of the map of {volume} is not loaded and cannot be written")
        slots = self.slots(*self.extent_of(page))
        if bool((slots["kind"] == Kind.ZERO).all()):
            return None
        paid = (slots["kind"] == Kind.RAW) | (slots["kind"] == Kind.ZSTD)
        numbers, local = np.unique(slots["segment"][paid], return_inverse=True)
        slots["segment"][paid] = local
        return Page(volume, page, tuple(self._keys.key(int(number)) for number in numbers), slots)

    def checkpointed(self, parts: Mapping[int, PartRef | None]) -> None:
        """A root was committed that has these pages here (``None``: all zero). Nothing is changed any more."""
        for page, part in parts.items():
            if part is None:
                self.parts.pop(page, None)
            else:
                self.parts[page] = part
        self.changed[:] = False


class CommittedMap:
    """The maps of all volumes of a group, with one table of keys."""

    def __init__(self, directory: str | None = None) -> None:
        self.keys = KeyTable()
        self.volumes: dict[str, VolumeMap] = {}
        self._directory = directory

    def add(
        self, name: str, chunk_count: int, page_chunks: int, parts: Mapping[int, PartRef] | None = None
    ) -> VolumeMap:
        """Add a volume."""
        made = VolumeMap(chunk_count, page_chunks, self.keys, parts=parts, directory=self._directory)
        self.volumes[name] = made
        return made

    def apply(self, index: Index, key: str) -> None:
        """Take over all entries of a segment."""
        for name, entries in index.by_volume():
            volume = self.volumes.get(name)
            if volume is None:
                raise CorruptionError(f"segment {key} is about a volume {name} that the group does not have")
            volume.apply(entries, key)

    def close(self) -> None:
        """Give all space back. Twice is harmless."""
        for volume in self.volumes.values():
            volume.close()
