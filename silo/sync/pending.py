"""Segments that are in the store and in no head yet.

While a cut is uploaded, and in the rounds ahead of it, finished segments are listed here. The commit puts them into
the head. When the cut is abandoned instead they stay: its chunks are dirty again, so each of them will be in the next
cut, and those whose content is still the same need not be uploaded twice. The next head then lists the older segments
first and the newer ones after them, which override what has changed.

So a chunk is compared with what the head *will* say: with the segments left over from rounds and abandoned cuts, and
below them with the committed map. It is not compared with the segments of the cut in progress, which cannot name it
twice.

Indexes are kept in a spooled temporary file: 64 bytes per chunk would be too much memory for a first cut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import attrs

from silo.chunkmap import Indices
from silo.sync.codec import Kind, digest_of
from silo.sync.committed import CommittedMap
from silo.sync.head import PartRef, SegmentRef
from silo.sync.layout import SegmentName
from silo.sync.manifest import Manifest
from silo.sync.segment import Index, Segment, parse_index

__all__ = ["Pending"]

SPOOL_MEMORY = 4 * 1024 * 1024


@attrs.frozen(order=True)
class _Listed:
    seq: int
    segment: SegmentRef = attrs.field(order=False)
    spooled: tuple[int, int] = attrs.field(order=False)
    digest: bytes = attrs.field(order=False)
    """Of the index as it is spooled."""


class Pending:
    """See the module. One event loop; nothing here waits."""

    def __init__(self, manifest: Manifest, directory: str | None = None) -> None:
        self._manifest = manifest
        self._directory = directory
        self._listed: list[_Listed] = []
        self._left_over: CommittedMap | None = None
        self.retiring: frozenset[str] = frozenset()
        """Segments that are to become empty: what is in them is stored again although its content is the same."""
        self._carried = 0
        """How many of the listed segments are in there."""
        self._spool = tempfile.SpooledTemporaryFile(SPOOL_MEMORY, dir=directory)  # noqa: SIM115
        self._spool_end = 0

    @property
    def segments(self) -> tuple[SegmentRef, ...]:
        """What the next head must list after what it lists now, in order."""
        return tuple(listed.segment for listed in self._listed)

    @property
    def last_seq(self) -> int:
        """The highest sequence number among them, or 0."""
        return self._listed[-1].seq if self._listed else 0

    def add(self, name: SegmentName, segment: Segment) -> None:
        """A segment of the cut in progress is stored."""
        reference = SegmentRef(
            name.key, segment.size, segment.index_offset, segment.index_length, segment.index_digest.hex()
        )
        self._spool.seek(self._spool_end)
        self._spool.write(segment.index)
        spooled = (self._spool_end, len(segment.index))
        self._spool_end += len(segment.index)
        self._listed.append(_Listed(name.seq, reference, spooled, digest_of(segment.index)))
        self._listed.sort()  # uploads end in any order

    def digests(self, volume: str, chunks: Indices) -> list[bytes | None]:
        """The digests that the next head gives to chunks that it need not list again; ``None`` where there is none."""
        committed = self._manifest.volume(volume)
        found = committed.digests(chunks)
        if self.retiring:
            for position, chunk in enumerate(chunks.tolist()):
                place = committed.locate(chunk)
                if place is not None and place.key in self.retiring:
                    found[position] = None
        if self._left_over is not None:
            newer = self._left_over.volumes[volume]
            for position, chunk in enumerate(chunks.tolist()):
                place = newer.locate(chunk)
                if place is not None:
                    found[position] = place.digest if place.kind in (Kind.RAW, Kind.ZSTD) else None
        return found

    def is_zero(self, volume: str, first: int, limit: int) -> bool:
        """Whether a run is known to be zero in the next head without being listed again."""
        if self._left_over is not None:
            return False  # an entry of 64 bytes too many, in a rare case
        return self._manifest.volume(volume).is_zero(first, limit)

    def indexes(self) -> Iterator[tuple[SegmentRef, Index]]:
        """All of them with their indexes, in order."""
        for listed in self._listed:
            yield listed.segment, self._index(listed)

    def _index(self, listed: _Listed) -> Index:
        start, length = listed.spooled
        self._spool.seek(start)
        return parse_index(
            self._spool.read(length),
            index_offset=listed.segment.index_offset,
            digest=listed.digest,
            encrypted=self._manifest.keys is not None,
        )

    def carry_over(self) -> None:
        """A round has ended, or a cut was abandoned: what is stored is compared with from now on. Nothing may be on its
        way to the store."""
        if len(self._listed) == self._carried:
            return
        if self._left_over is None:
            self._left_over = CommittedMap(self._directory)
            nowhere = PartRef("", 0, 0, "")
            for name, volume in self._manifest.maps.volumes.items():
                unknown = dict.fromkeys(range(volume.page_total), nowhere)
                self._left_over.add(name, volume.chunk_count, volume.page_chunks, unknown)
        for listed in self._listed[self._carried :]:
            self._left_over.apply(self._index(listed), listed.segment.key)
        self._carried = len(self._listed)

    def clear(self) -> None:
        """They are in the head, or may never be."""
        self._drop_left_over()
        self._listed.clear()
        self._spool.seek(0)
        self._spool.truncate()
        self._spool_end = 0

    def _drop_left_over(self) -> None:
        if self._left_over is not None:
            self._left_over.close()
            self._left_over = None
        self._carried = 0

    def close(self) -> None:
        """Give all space back."""
        self._drop_left_over()
        self._spool.close()
