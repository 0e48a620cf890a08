"""Segments: immutable packs of chunks with their own index at the end.

::

    preamble (16) │ payloads, back to back │ index: owner, volume names, entries │ footer (64)

The index alone says everything about the payloads: which chunk of which volume each one is, how it is
stored, and the digest of its content. The footer locates the index and carries its digest, which ``head``
carries as well; so a segment can be read through ``head``, or found by itself and read from its end. A
segment without payloads is legal: it says which chunks became zero.

No chunk occurs twice in one index, so the order of the entries means nothing. The order of segments does:
it is the order in ``head``.

Everything here is pure. Parsers take untrusted bytes and raise `CorruptionError`, nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from silo.abc import Buffer
from silo.errors import CorruptionError, InvalidRequestError, InvariantError
from silo.geometry import CHUNK_SIZE_MAX
from silo.names import check_group_name, check_volume_name
from silo.sync.cipher import OVERHEAD, Sealer
from silo.sync.codec import DIGEST_SIZE, Kind, digest_of
from silo.sync.layout import (
    FEATURE_ENCRYPTED,
    PREAMBLE_SIZE,
    Magic,
    pack_preamble,
    parse_preamble,
)
from silo.sync.nametable import pack_names, parse_names

__all__ = [
    "CHUNK_LIMIT",
    "ENTRY",
    "FOOTER_SIZE",
    "Entries",
    "Footer",
    "Index",
    "Segment",
    "SegmentBuilder",
    "parse_footer",
    "parse_index",
]

ENTRY = np.dtype(
    [
        ("volume", "<u2"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("count", "<u4"),
        ("chunk", "<u8"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("key_id", "<u4"),
        ("digest", "u1", (DIGEST_SIZE,)),
    ]
)
"""One entry of an index, 64 bytes."""

Entries = npt.NDArray[np.void]

CHUNK_LIMIT = 1 << 38
"""One past the largest chunk index: a volume of 1 PiB in chunks of 4 KiB."""

RUN_LIMIT = 1 << 32
VOLUMES_MAX = 1 << 16

_ENTRY = struct.Struct("<HBBIQQII32s")
_FOOTER = struct.Struct("<QII32s")
FOOTER_SIZE = PREAMBLE_SIZE + _FOOTER.size

_PAYLOAD_KINDS = (Kind.RAW, Kind.ZSTD)
NO_DIGEST = bytes(DIGEST_SIZE)


@attrs.frozen
class Segment:
    """A finished segment: the bytes to upload, and what ``head`` must say of it."""

    buffers: Sequence[Buffer]
    size: int
    index: bytes
    """Itself, whatever it is stored as."""
    index_offset: int
    index_length: int
    index_digest: bytes
    """Of what is stored, as the length."""

    @property
    def footer(self) -> Buffer:
        """The last bytes of the object. Two objects with equal footers hold the same chunks."""
        return self.buffers[-1]


class SegmentBuilder:
    """Collects entries and payloads. Payloads are referred to, not copied, and must not change any more."""

    def __init__(self, group: str, volumes: Sequence[str], key_id: int = 0) -> None:
        """With a ``key_id`` the segment will be encrypted under that key."""
        self._key_id = key_id
        self._overhead = OVERHEAD if key_id else 0
        self._table = _table(group, volumes)
        self._volumes = {name: number for number, name in enumerate(volumes)}
        self._payloads: list[Buffer] = []
        self._owners: list[tuple[str, int]] = []
        self._entries: list[bytes] = []
        self._end = PREAMBLE_SIZE
        self.size = PREAMBLE_SIZE + len(self._table) + self._overhead + FOOTER_SIZE
        """Bytes of the object if it were sealed now."""

    @property
    def entry_count(self) -> int:
        """How many entries there are."""
        return len(self._entries)

    def add(self, volume: str, chunk: int, kind: Kind, payload: Buffer, digest: bytes) -> None:
        """Add a chunk with a payload."""
        if kind not in _PAYLOAD_KINDS or not payload or len(digest) != DIGEST_SIZE:
            raise InvariantError(f"a payload of {len(payload)} bytes and kind {kind} cannot be stored")
        number, length = self._volumes[volume], len(payload) + self._overhead
        self._entries.append(_ENTRY.pack(number, kind, 0, 1, chunk, self._end, length, self._key_id, digest))
        self._payloads.append(payload)
        if self._key_id:
            self._owners.append((volume, chunk))
        self._end += length
        self.size += length + ENTRY.itemsize

    def add_run(self, volume: str, first: int, limit: int, *, base: bytes | None = None) -> None:
        """Add a run of chunks that are zero or, when the digest of a ``base`` is given, as they are there."""
        kind = Kind.ZERO if base is None else Kind.INHERIT
        for start in range(first, limit, RUN_LIMIT - 1):
            count = min(limit - start, RUN_LIMIT - 1)
            number = self._volumes[volume]
            self._entries.append(_ENTRY.pack(number, kind, 0, count, start, 0, 0, 0, base or NO_DIGEST))
            self.size += ENTRY.itemsize

    def seal(self, sealer: Sealer | None = None) -> Segment:
        """The finished segment. The builder must not be used afterwards. With a ``sealer``, which a builder with a key
        needs, this takes time."""
        if (sealer.key_id if sealer is not None else 0) != self._key_id:
            raise InvariantError("a segment was begun under one key and finished under another")
        index = self._table + b"".join(self._entries)
        stored, payloads, features = index, self._payloads, 0
        if sealer is not None:
            payloads = [
                sealer.chunk(payload, *owner)
                for payload, owner in zip(self._payloads, self._owners, strict=True)
            ]
            stored, features = sealer.part(index, self._end), FEATURE_ENCRYPTED
        digest = digest_of(stored)
        footer = pack_preamble(Magic.FOOTER, features) + _FOOTER.pack(
            self._end, len(stored), len(self._entries), digest
        )
        buffers = [pack_preamble(Magic.SEGMENT, features), *payloads, stored, footer]
        return Segment(buffers, self.size, index, self._end, len(stored), digest)


@attrs.frozen
class Footer:
    """What the last 64 bytes of a segment say."""

    index_offset: int
    index_length: int
    entry_count: int
    index_digest: bytes


@attrs.frozen
class Index:
    """A verified index: the owner, its names of volumes, and the entries as a numpy array of `ENTRY`."""

    group: str
    volumes: tuple[str, ...]
    entries: Entries

    def by_volume(self) -> Iterator[tuple[str, Entries]]:
        """The entries of each volume that has any."""
        for number, name in enumerate(self.volumes):
            chosen = self.entries[self.entries["volume"] == number]
            if len(chosen):
                yield name, chosen


def parse_footer(data: Buffer, size: int, *, encrypted: bool = False) -> Footer:
    """The footer of an object of ``size`` bytes, whose last `FOOTER_SIZE` bytes are ``data``."""
    if parse_preamble(data, Magic.FOOTER) != (FEATURE_ENCRYPTED if encrypted else 0):
        raise CorruptionError("a segment is encrypted, or should be, and is not")
    if len(data) != FOOTER_SIZE:
        raise CorruptionError(f"a footer has {FOOTER_SIZE} bytes, not {len(data)}")
    footer = Footer(*_FOOTER.unpack_from(data, PREAMBLE_SIZE))
    if footer.index_offset < PREAMBLE_SIZE or footer.index_offset + footer.index_length + FOOTER_SIZE != size:
        raise CorruptionError("a footer points outside its segment")
    return footer


def parse_index(data: Buffer, *, index_offset: int, digest: bytes, encrypted: bool = False) -> Index:
    """The index that begins at ``index_offset`` of its segment and must have this digest. ``encrypted``: what it
    describes is, and it was."""
    if digest_of(data) != digest:
        raise CorruptionError("the index of a segment does not have its digest")
    group, volumes, start = _parse_table(data)
    if (len(data) - start) % ENTRY.itemsize:
        raise CorruptionError(f"an index has {len(data)} bytes, which is no whole number of entries")
    entries = np.frombuffer(data, dtype=ENTRY, offset=start)
    _check_entries(entries, len(volumes), index_offset, encrypted=encrypted)
    return Index(group, volumes, entries)


def _check_entries(entries: Entries, volume_count: int, index_offset: int, *, encrypted: bool) -> None:
    kind, count, chunk = entries["kind"], entries["count"], entries["chunk"]
    offset, length = entries["offset"], entries["length"]
    paid = (kind == Kind.RAW) | (kind == Kind.ZSTD)
    if not bool((paid | (kind == Kind.ZERO) | (kind == Kind.INHERIT)).all()):
        raise CorruptionError("an index has entries of an unknown kind")
    sound = (entries["volume"] < volume_count) & (entries["flags"] == 0)
    sound &= (entries["key_id"] != 0) == (paid & encrypted)
    sound &= (count > 0) & (chunk < CHUNK_LIMIT) & (count <= CHUNK_LIMIT - np.minimum(chunk, CHUNK_LIMIT))
    in_place = (
        (count == 1)
        & (length > 0)
        & (length <= CHUNK_SIZE_MAX + OVERHEAD * encrypted)
        & (offset >= PREAMBLE_SIZE)
    )
    in_place &= (offset < index_offset) & (length <= index_offset - np.minimum(offset, index_offset))
    sound &= np.where(paid, in_place, (offset == 0) & (length == 0))
    if not bool(sound.all()):
        raise CorruptionError("an index has entries that are out of bounds")
    # In order of chunks, none may begin before the previous one ends.
    order = np.lexsort((chunk, entries["volume"]))
    volume, first, limit = entries["volume"][order], chunk[order], (chunk + count)[order]
    if bool(((volume[1:] == volume[:-1]) & (first[1:] < limit[:-1])).any()):
        raise CorruptionError("an index names a chunk twice")


def _table(group: str, volumes: Sequence[str]) -> bytes:
    """The names with which an index begins: the owning group, then the volumes."""
    check_group_name(group)
    for name in volumes:
        check_volume_name(name)
    if not 0 < len(volumes) <= VOLUMES_MAX or len(set(volumes)) != len(volumes):
        raise InvalidRequestError("the volumes of a segment need distinct names")
    return pack_names([group, *volumes])


def _parse_table(data: Buffer) -> tuple[str, tuple[str, ...], int]:
    names, end = parse_names(data)
    if not 1 < len(names) <= VOLUMES_MAX + 1 or len(set(names[1:])) != len(names) - 1:
        raise CorruptionError("an index does not name its owner and its volumes")
    try:
        check_group_name(names[0])
        for name in names[1:]:
            check_volume_name(name)
    except InvalidRequestError as error:
        raise CorruptionError(f"an index names what cannot exist: {error.message}") from None
    return names[0], names[1:], end
