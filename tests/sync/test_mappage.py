"""Pages and roots of the chunk map: round trips, damage, hostile bytes."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from silo.errors import CorruptionError
from silo.sync.codec import Kind, digest_of
from silo.sync.head import PartRef
from silo.sync.layout import SegmentName
from silo.sync.mappage import (
    SLOT,
    Page,
    Root,
    encode_page,
    encode_root,
    page_chunks_for,
    page_count,
    parse_page,
    parse_root,
)

KEYS = tuple(SegmentName("vm1", 1, seq, "0123456789abcdef").key for seq in (1, 2, 3))


def slots(*rows: tuple[int, int, int, int]) -> np.ndarray:
    """Slots of (kind, segment, offset, length)."""
    array = np.zeros(len(rows), dtype=SLOT)
    for number, row in enumerate(rows):
        array["kind"][number], array["segment"][number], array["offset"][number], array["length"][number] = (
            row
        )
        array["digest"][number] = number + 1 if row[0] != Kind.ZERO else 0
    return array


def make_page() -> Page:
    rows = [(Kind.RAW, 0, 16, 65536), (Kind.ZERO, 0, 0, 0), (Kind.ZSTD, 1, 70000, 9), (Kind.INHERIT, 0, 0, 0)]
    return Page("disk", 4, KEYS[:2], slots(*rows))


def reparse(data: bytes, **changes: object) -> Page:
    expected = {"digest": digest_of(data), "volume": "disk", "page": 4, "entry_count": 4} | changes
    return parse_page(data, **expected)  # type: ignore[arg-type]


def make_root() -> Root:
    return Root(
        {"disk": 1024, "ram": 4096, "empty": 2048},
        {
            "disk": {0: PartRef(KEYS[0], 16, 57000, "ab" * 32), 7: PartRef(KEYS[1], 16, 57000, "cd" * 32)},
            "ram": {3: PartRef(KEYS[0], 57016, 100, "ef" * 32)},
            "empty": {},
        },
    )


def test_a_page_round_trips() -> None:
    page = make_page()
    found = reparse(encode_page(page))
    assert (found.volume, found.page, found.keys) == (page.volume, page.page, page.keys)
    assert found.slots.tobytes() == page.slots.tobytes()


def test_a_root_round_trips() -> None:
    root = make_root()
    data = encode_root(root)
    assert parse_root(data) == root
    assert parse_root(data, digest=digest_of(data)) == root


def test_every_flipped_byte_is_noticed() -> None:
    """The digest one level up covers every byte of a page and of a root."""
    page, root = bytearray(encode_page(make_page())), bytearray(encode_root(make_root()))
    page_digest, root_digest = digest_of(page), digest_of(root)
    for at in range(len(page)):
        page[at] ^= 0x10
        with pytest.raises(CorruptionError):
            reparse(bytes(page), digest=page_digest)
        page[at] ^= 0x10
    for at in range(len(root)):
        root[at] ^= 0x10
        with pytest.raises(CorruptionError):
            parse_root(bytes(root), digest=root_digest)
        root[at] ^= 0x10


def test_shortened_parts_are_refused() -> None:
    """Even when the digest says that the bytes are the right ones."""
    for whole, parse in ((encode_page(make_page()), reparse), (encode_root(make_root()), parse_root)):
        for end in range(len(whole)):
            with pytest.raises(CorruptionError):
                parse(whole[:end])
        with pytest.raises(CorruptionError):
            parse(whole + b"\0")


@given(st.data())
def test_damage_behind_a_right_digest_never_escapes(data: st.DataObject) -> None:
    """Hostile bytes are parsed or refused with CorruptionError, whatever they are."""
    is_page = data.draw(st.booleans())
    part = bytearray(encode_page(make_page()) if is_page else encode_root(make_root()))
    for _ in range(data.draw(st.integers(1, 4))):
        part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    try:
        if is_page:
            reparse(bytes(part))
        else:
            parse_root(bytes(part))
    except CorruptionError:
        pass
    else:
        assert len(part) > 24


@pytest.mark.parametrize(
    "row",
    [
        (0, 0, 0, 0),
        (Kind.DELTA, 0, 16, 1),
        (Kind.RAW, 2, 16, 1),
        (Kind.RAW, 0, 15, 1),
        (Kind.RAW, 0, 16, 0),
        (Kind.RAW, 0, 16, (1 << 22) + 1),
        (Kind.RAW, 0, 1 << 40, 1),
        (Kind.ZERO, 1, 0, 0),
        (Kind.ZERO, 0, 16, 0),
    ],
)
def test_entries_out_of_bounds_are_refused(row: tuple[int, int, int, int]) -> None:
    data = encode_page(Page("disk", 0, KEYS[:2], slots(row)))
    with pytest.raises(CorruptionError, match="out of bounds"):
        reparse(data, page=0, entry_count=1)


@pytest.mark.parametrize("changes", [{"volume": "ram"}, {"page": 5}, {"entry_count": 3}])
def test_a_page_in_the_wrong_place_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CorruptionError):
        reparse(encode_page(make_page()), **changes)


@pytest.mark.parametrize(
    "root",
    [
        Root({"disk": 1000}, {}),
        Root({"disk": 512}, {}),
        Root({"a/b": 1024}, {}),
        Root({"disk": 1024}, {"disk": {0: PartRef("vm1/head", 16, 1, "ab" * 32)}}),
        Root({"disk": 1024}, {"disk": {0: PartRef(KEYS[0], 15, 1, "ab" * 32)}}),
        Root({"disk": 1024}, {"disk": {0: PartRef(KEYS[0], 16, 0, "ab" * 32)}}),
    ],
)
def test_impossible_roots_are_refused(root: Root) -> None:
    with pytest.raises(CorruptionError):
        parse_root(encode_root(root))


@given(st.integers(1, 1 << 38))
def test_a_volume_has_at_most_256_pages(chunk_count: int) -> None:
    chunks = page_chunks_for(chunk_count)
    assert chunks >= 1024
    assert page_count(chunk_count, chunks) <= 256
    assert chunks == 1024 or page_count(chunk_count, chunks) > 128
