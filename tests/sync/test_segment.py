"""Segments: what is built is what is parsed, and no flipped byte goes unnoticed."""

from __future__ import annotations

import struct

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from silo.errors import CorruptionError, InvalidRequestError, InvariantError
from silo.sync.codec import ChunkDecoder, ChunkEncoder, Kind, digest_of
from silo.sync.segment import ENTRY, FOOTER_SIZE, Index, Segment, SegmentBuilder, parse_footer, parse_index

CONTENTS = {0: b"raw" * 100, 5: b"\x01" * 4096, 6: bytes(range(256)) * 16}


def build() -> Segment:
    builder = SegmentBuilder("vm1", ["disk", "ram"])
    encoder = ChunkEncoder()
    for chunk, content in CONTENTS.items():
        encoded = encoder.encode(content)
        assert encoded is not None
        builder.add("ram", chunk, encoded.kind, encoded.payload, encoded.digest)
    builder.add_run("disk", 10, 1000)
    builder.add_run("disk", 5, 7, base=bytes(range(32)))
    return builder.seal()


def whole(segment: Segment) -> bytes:
    return b"".join(segment.buffers)


def read(data: bytes) -> tuple[Index, dict[int, bytes]]:
    """Read a segment from its end, as a tool would that knows nothing but the object."""
    footer = parse_footer(data[-FOOTER_SIZE:], len(data))
    index_bytes = data[footer.index_offset : footer.index_offset + footer.index_length]
    index = parse_index(index_bytes, index_offset=footer.index_offset, digest=footer.index_digest)
    if len(index.entries) != footer.entry_count:
        raise CorruptionError("the footer counts other entries")
    found = {}
    decoder = ChunkDecoder()
    for entry in index.entries:
        if entry["kind"] in (Kind.RAW, Kind.ZSTD):
            payload = data[int(entry["offset"]) : int(entry["offset"]) + int(entry["length"])]
            chunk = int(entry["chunk"])
            expected = entry["digest"].tobytes()
            found[chunk] = bytes(decoder.decode(int(entry["kind"]), payload, len(CONTENTS[chunk]), expected))
    return index, found


def test_what_was_built_is_read_back() -> None:
    """The owner, the names, the runs and every content survive the round trip."""
    segment = build()
    data = whole(segment)
    assert len(data) == segment.size
    assert data[segment.index_offset :][: len(segment.index)] == segment.index
    index, found = read(data)
    assert (index.group, index.volumes) == ("vm1", ("disk", "ram"))
    assert found == CONTENTS
    parts = dict(index.by_volume())
    assert [(int(e["kind"]), int(e["chunk"]), int(e["count"])) for e in parts["disk"]] == [
        (Kind.ZERO, 10, 990),
        (Kind.INHERIT, 5, 2),
    ]
    assert parts["disk"][1]["digest"].tobytes() == bytes(range(32))
    assert parts["ram"]["chunk"].tolist() == [0, 5, 6]


def test_a_segment_may_have_no_payload() -> None:
    """Zeroing alone makes an index-only segment."""
    builder = SegmentBuilder("vm1", ["disk"])
    builder.add_run("disk", 0, (1 << 32) + 5)
    segment = builder.seal()
    index, found = read(whole(segment))
    assert found == {}
    assert int(index.entries["count"].sum()) == (1 << 32) + 5
    assert segment.index_offset == 16


def test_every_flipped_byte_is_noticed() -> None:
    """Whatever byte of a segment is damaged, reading it fails, or every content is still right."""
    data = bytearray(whole(build()))
    unnoticed = []
    for at in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            data[at] ^= mask
            try:
                _, found = read(bytes(data))
            except CorruptionError:
                pass
            else:
                # The preamble is not covered by a digest that readers of single chunks need.
                assert found == CONTENTS
                unnoticed.append(at)
            data[at] ^= mask
    assert all(at < 16 for at in unnoticed)


@given(st.binary(max_size=400))
def test_hostile_index_bytes_end_in_corruption(data: bytes) -> None:
    """Bytes with a matching digest are still only ever parsed or refused."""
    try:
        index = parse_index(data, index_offset=1000, digest=digest_of(data))
    except CorruptionError:
        return
    assert index.volumes


@given(st.binary(max_size=200), st.integers(0, 1 << 40))
def test_hostile_footers_end_in_corruption(data: bytes, size: int) -> None:
    with pytest.raises(CorruptionError):
        parse_footer(data, size)


def entry(**fields: int) -> bytes:
    array = np.zeros(1, dtype=ENTRY)
    values = {"kind": 1, "count": 1, "chunk": 3, "offset": 16, "length": 10} | fields
    for name, value in values.items():
        array[name] = value
    return array.tobytes()


def parse(*entries: bytes) -> Index:
    table = SegmentBuilder("vm1", ["disk"]).seal().index
    data = table + b"".join(entries)
    return parse_index(data, index_offset=1000, digest=digest_of(data))


@pytest.mark.parametrize(
    "fields",
    [
        {"volume": 1},
        {"kind": 0},
        {"kind": Kind.DELTA},
        {"kind": 6},
        {"flags": 1},
        {"key_id": 1},
        {"count": 0},
        {"count": 2},
        {"chunk": 1 << 38},
        {"chunk": (1 << 64) - 1},
        {"offset": 15},
        {"offset": 991},
        {"offset": (1 << 64) - 5},
        {"length": 0},
        {"length": 985},
        {"length": (1 << 22) + 1},
        {"kind": Kind.ZERO},
        {"kind": Kind.ZERO, "offset": 0},
        {"kind": Kind.ZERO, "offset": 0, "length": 0, "count": 0},
        {"kind": Kind.ZERO, "offset": 0, "length": 0, "chunk": (1 << 38) - 1, "count": 2},
    ],
)
def test_entries_out_of_bounds_are_refused(fields: dict[str, int]) -> None:
    """Every field has bounds, and its neighbours inside them are accepted."""
    assert len(parse(entry()).entries) == 1
    with pytest.raises(CorruptionError):
        parse(entry(**fields))


def test_a_chunk_named_twice_is_refused() -> None:
    zeros = {"kind": Kind.ZERO, "offset": 0, "length": 0}
    assert len(parse(entry(chunk=2), entry(chunk=0, count=2, **zeros)).entries) == 2
    with pytest.raises(CorruptionError, match="twice"):
        parse(entry(chunk=2), entry(chunk=0, count=3, **zeros))
    with pytest.raises(CorruptionError, match="twice"):
        parse(entry(), entry())


def test_a_newer_format_is_refused_with_a_hint() -> None:
    """An unknown version or feature bit is told apart from nonsense."""
    footer = bytearray(bytes(build().footer))
    struct.pack_into("<I", footer, 12, 4)
    with pytest.raises(CorruptionError, match="newer version of Silo"):
        parse_footer(footer, build().size)


def test_the_builder_refuses_what_could_not_be_read() -> None:
    builder = SegmentBuilder("vm1", ["disk"])
    with pytest.raises(InvariantError):
        builder.add("disk", 0, Kind.ZERO, b"", b"")
    with pytest.raises(InvariantError):
        builder.add("disk", 0, Kind.RAW, b"x", b"short")
    for volumes in ([], ["a", "a"], ["no/slash"]):
        with pytest.raises(InvalidRequestError):
            SegmentBuilder("vm1", volumes)
    with pytest.raises(InvalidRequestError):
        SegmentBuilder("", ["disk"])
