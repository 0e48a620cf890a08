"""The paged chunk map: for every chunk of a volume, where its content is. Pages, and the root that names them.

A *page* covers a power of two of consecutive chunks of one volume and stands for itself: it brings the keys
of the segments that its entries refer to. Pages are immutable, like everything under ``segments/``; a checkpoint
writes those that changed, and a new *root*, as parts of one object. A page whose chunks are all zero is not
written: no entry in the root means zeros.

::

    object  preamble │ page │ page │ … │ root
    page    preamble │ page number (u32), entry count (u32) │ names: volume, keys… │ entries of 56 bytes
    root    preamble │ entry count (u32), four bytes of zero │ names: volumes…
                     │ chunks per page (u32 for each volume), zeros up to a multiple of eight
                     │ names: keys… │ entries of 56 bytes

The digest of the root stands in the head, the digest of each page in the root, the digest of each chunk in its
page. Everything here is pure. Parsers take untrusted bytes and raise `CorruptionError`, nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from silo.abc import Buffer
from silo.errors import CorruptionError, InvalidRequestError
from silo.geometry import CHUNK_SIZE_MAX
from silo.names import check_volume_name
from silo.sync.cipher import OVERHEAD
from silo.sync.codec import DIGEST_SIZE, Kind, digest_of
from silo.sync.head import HEAD_SIZE_MAX, PartRef
from silo.sync.layout import (
    PREAMBLE_SIZE,
    Magic,
    pack_preamble,
    parse_preamble,
    parse_segment_key,
)
from silo.sync.nametable import pack_names, parse_names

__all__ = [
    "PAGE_CHUNKS_MIN",
    "SLOT",
    "Page",
    "Root",
    "Slots",
    "encode_page",
    "encode_root",
    "page_chunks_for",
    "page_count",
    "parse_page",
    "parse_root",
]

SLOT = np.dtype(
    [
        ("kind", "u1"),
        ("flags", "u1"),
        ("reserved", "<u2"),
        ("segment", "<u4"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("key_id", "<u4"),
        ("digest", "u1", (DIGEST_SIZE,)),
    ]
)
"""Where one chunk is, 56 bytes. ``segment`` is a number in the table of keys that comes with the slots."""

Slots = npt.NDArray[np.void]

ROOT_ENTRY = np.dtype(
    [
        ("volume", "<u2"),
        ("reserved", "<u2"),
        ("page", "<u4"),
        ("key", "<u4"),
        ("length", "<u4"),
        ("offset", "<u8"),
        ("digest", "u1", (DIGEST_SIZE,)),
    ]
)

PAGE_CHUNKS_MIN = 1024
PAGE_CHUNKS_MAX = 1 << 30
PAGES_WANTED = 256
"""Pages per volume: so the root of one or two volumes fits into the head, and the first read of a lazy restore
takes three round trips (head; page; chunk) whatever the size of the disk."""

_TWO = struct.Struct("<II")


def page_chunks_for(chunk_count: int) -> int:
    """How many chunks a page of a volume covers: the least power of two that makes at most 256 pages."""
    chunks = PAGE_CHUNKS_MIN
    while chunks * PAGES_WANTED < chunk_count:
        chunks *= 2
    return chunks


def page_count(chunk_count: int, page_chunks: int) -> int:
    """How many pages a volume has, the short last one included."""
    return -(-chunk_count // page_chunks)


@attrs.frozen
class Page:
    """A verified page: ``slots[i]`` is the chunk ``page * page_chunks + i``, and ``keys[slot.segment]`` its object."""

    volume: str
    page: int
    keys: tuple[str, ...]
    slots: Slots


@attrs.frozen
class Root:
    """The directory: for each volume, how large its pages are and where those with content are."""

    page_chunks: Mapping[str, int]
    pages: Mapping[str, Mapping[int, PartRef]]


def encode_page(page: Page) -> bytes:
    """The bytes of a page, to be found by their digest in a root."""
    head = _TWO.pack(page.page, len(page.slots))
    names = pack_names([page.volume, *page.keys])
    return b"".join((pack_preamble(Magic.PAGE), head, names, page.slots.astype(SLOT, copy=False).tobytes()))


def parse_page(
    data: Buffer, *, digest: bytes, volume: str, page: int, entry_count: int, encrypted: bool = False
) -> Page:
    """The page that must have this digest and be about these chunks, which are ``encrypted`` or not."""
    if digest_of(data) != digest:
        raise CorruptionError(f"page {page} of the map of {volume} does not have its digest")
    parse_preamble(data, Magic.PAGE)
    number, count = _parse_two(data)
    names, start = parse_names(data, PREAMBLE_SIZE + _TWO.size)
    if not names or (names[0], number, count) != (volume, page, entry_count):
        raise CorruptionError(f"page {page} of the map of {volume} is about something else")
    for key in names[1:]:
        parse_segment_key(key)
    if len(data) - start != count * SLOT.itemsize:
        raise CorruptionError(f"page {page} of the map of {volume} has a wrong length")
    slots = np.frombuffer(data, dtype=SLOT, offset=start)
    _check_slots(slots, len(names) - 1, encrypted=encrypted)
    return Page(volume, page, names[1:], slots)


def _check_slots(slots: Slots, key_count: int, *, encrypted: bool) -> None:
    kind, offset, length = slots["kind"], slots["offset"], slots["length"]
    paid = (kind == Kind.RAW) | (kind == Kind.ZSTD)
    sound = paid | (kind == Kind.ZERO) | (kind == Kind.INHERIT)
    sound &= (slots["flags"] == 0) & (slots["reserved"] == 0)
    sound &= (slots["key_id"] != 0) == (paid & encrypted)
    placed = (
        (slots["segment"] < key_count)
        & (length > 0)
        & (length <= CHUNK_SIZE_MAX + (OVERHEAD if encrypted else 0))
    )
    placed &= (offset >= PREAMBLE_SIZE) & (offset < 1 << 40)
    sound &= np.where(paid, placed, (slots["segment"] == 0) & (offset == 0) & (length == 0))
    if not bool(sound.all()):
        raise CorruptionError("a page of the map has entries that are out of bounds")


def encode_root(root: Root) -> bytes:
    """The bytes of a root, to be found by their digest in a head."""
    volumes = list(root.page_chunks)
    keys: dict[str, int] = {}
    rows = []
    for number, volume in enumerate(volumes):
        for page, part in sorted(root.pages.get(volume, {}).items()):
            key = keys.setdefault(part.key, len(keys))
            digest = np.frombuffer(bytes.fromhex(part.digest), dtype=np.uint8)
            rows.append((number, 0, page, key, part.length, part.offset, digest))
    sizes = struct.pack(f"<{len(volumes)}I", *root.page_chunks.values())
    return b"".join(
        (
            pack_preamble(Magic.ROOT),
            _TWO.pack(len(rows), 0),
            pack_names(volumes),
            sizes + bytes(-len(sizes) % 8),
            pack_names(list(keys)),
            np.array(rows, dtype=ROOT_ENTRY).tobytes(),
        )
    )


def parse_root(data: Buffer, *, digest: bytes | None = None) -> Root:
    """The root that must have this digest. Inline roots need none: the digest of the head covers them."""
    if digest is not None and digest_of(data) != digest:
        raise CorruptionError("the root of the map does not have its digest")
    parse_preamble(data, Magic.ROOT)
    count, zero = _parse_two(data)
    volumes, at = parse_names(data, PREAMBLE_SIZE + _TWO.size)
    sizes_end = at + (len(volumes) + 1) // 2 * 8
    if zero or sizes_end > len(data):
        raise CorruptionError("the root of the map is cut short")
    sizes = np.frombuffer(data, dtype="<u4", offset=at, count=(sizes_end - at) // 4).tolist()
    keys, start = parse_names(data, sizes_end)
    if len(data) - start != count * ROOT_ENTRY.itemsize:
        raise CorruptionError("the root of the map has a wrong length")
    _check_names(volumes, keys)
    if any(sizes[len(volumes) :]) or not all(map(_is_page_size, sizes[: len(volumes)])):
        raise CorruptionError("the root of the map has pages of an impossible size")
    pages = _parse_parts(np.frombuffer(data, dtype=ROOT_ENTRY, offset=start), volumes, keys)
    return Root(dict(zip(volumes, sizes, strict=False)), pages)


def _parse_parts(
    entries: Slots, volumes: Sequence[str], keys: Sequence[str]
) -> dict[str, dict[int, PartRef]]:
    sound = (entries["volume"] < len(volumes)) & (entries["reserved"] == 0) & (entries["key"] < len(keys))
    sound &= (entries["offset"] >= PREAMBLE_SIZE) & (entries["offset"] < 1 << 40)
    sound &= (entries["length"] > 0) & (entries["length"] <= HEAD_SIZE_MAX)
    if not bool(sound.all()):
        raise CorruptionError("the root of the map has entries that are out of bounds")
    pages: dict[str, dict[int, PartRef]] = {volume: {} for volume in volumes}
    for entry in entries:
        of_volume = pages[volumes[int(entry["volume"])]]
        if int(entry["page"]) in of_volume:
            raise CorruptionError("the root of the map names a page twice")
        of_volume[int(entry["page"])] = PartRef(
            keys[int(entry["key"])],
            int(entry["offset"]),
            int(entry["length"]),
            entry["digest"].tobytes().hex(),
        )
    return pages


def _parse_two(data: Buffer) -> tuple[int, int]:
    if len(data) < PREAMBLE_SIZE + _TWO.size:
        raise CorruptionError("a part of the map is cut short")
    first, second = _TWO.unpack_from(data, PREAMBLE_SIZE)
    return first, second


def _check_names(volumes: Sequence[str], keys: Sequence[str]) -> None:
    try:
        for volume in volumes:
            check_volume_name(volume)
    except InvalidRequestError as error:
        raise CorruptionError(f"the root of the map names what cannot exist: {error.message}") from None
    if len(set(volumes)) != len(volumes):
        raise CorruptionError("the root of the map names a volume twice")
    for key in keys:
        parse_segment_key(key)


def _is_page_size(size: int) -> bool:
    return PAGE_CHUNKS_MIN <= size <= PAGE_CHUNKS_MAX and size & (size - 1) == 0
