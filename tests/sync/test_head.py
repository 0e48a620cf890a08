"""The head: its bytes round-trip, its digest catches every flipped byte, its fields are bounded."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from silo.errors import CorruptionError
from silo.sync.codec import digest_of
from silo.sync.head import (
    ClaimRecord,
    Head,
    PartRef,
    RootRef,
    SegmentRef,
    VolumeInfo,
    WriterState,
    encode_head,
    parse_head,
)
from silo.sync.layout import SegmentName

KEY = SegmentName("vm1", 3, 9, "0123456789abcdef").key
DIGEST = "ab" * 32


def make(**changes: object) -> Head:
    head = Head(
        version=1,
        incompat=0,
        group="vm1",
        epoch=3,
        incarnation="0123456789abcdef",
        nonce="n1",
        generation=7,
        seq=9,
        cut_time=1700000000.25,
        state=WriterState.OPEN,
        volumes=(VolumeInfo("disk", 1 << 30, 65536, 512), VolumeInfo("ram", 1 << 20, 4096, 4096)),
        segments=(SegmentRef(KEY, 1080, 1000, 16, DIGEST),),
        root=RootRef(inline=b"root bytes"),
        claim=ClaimRecord("c1", 2, 6),
    )
    return msgspec.structs.replace(head, **changes)


def test_round_trip() -> None:
    """Every field survives, with a root in line, elsewhere, or none."""
    part = PartRef(KEY, 16, 100, DIGEST)
    for head in (make(), make(root=RootRef(stored=part), hot=part), make(root=None, claim=None, segments=())):
        assert parse_head(encode_head(head), "vm1") == head


def test_the_object_is_plain_json() -> None:
    """A script without this package finds what it needs under the documented names."""
    data = json.loads(encode_head(make()))
    assert set(data) == {"blake3", "head"}
    assert data["head"]["format"] == 1
    assert data["head"]["segments"][0] == {
        "key": KEY, "size": 1080, "index_offset": 1000, "index_length": 16, "index_digest": DIGEST,
    }  # fmt: skip


def test_every_flipped_byte_is_noticed() -> None:
    data = bytearray(encode_head(make()))
    for at in range(len(data)):
        for mask in (0x01, 0x20, 0x80):
            data[at] ^= mask
            with pytest.raises(CorruptionError):
                parse_head(data, "vm1")
            data[at] ^= mask
    assert parse_head(data, "vm1") == make()


def test_a_shortened_or_lengthened_head_is_noticed() -> None:
    data = encode_head(make())
    for end in range(len(data)):
        with pytest.raises(CorruptionError):
            parse_head(data[:end], "vm1")
    with pytest.raises(CorruptionError):
        parse_head(data + b" ", "vm1")


@pytest.mark.parametrize(
    "changes",
    [
        {"group": "vm2"},
        {"group": "../x"},
        {"epoch": 0},
        {"epoch": 10**10},
        {"incarnation": "xyz"},
        {"nonce": ""},
        {"generation": -1},
        {"gc_floor": -1},
        {"seq": -1},
        {"volumes": ()},
        {"volumes": (VolumeInfo("disk", 1 << 30, 65536, 512),) * 2},
        {"volumes": (VolumeInfo("a/b", 1 << 30, 65536, 512),)},
        {"volumes": (VolumeInfo("disk", 1 << 30, 65537, 512),)},
        {"volumes": (VolumeInfo("disk", 0, 65536, 512),)},
        {"segments": (SegmentRef("vm1/head", 1080, 1000, 16, DIGEST),)},
        {"segments": (SegmentRef(KEY, 1080, 1000, 17, DIGEST),)},
        {"segments": (SegmentRef(KEY, 80, 0, 16, DIGEST),)},
        {"segments": (SegmentRef(KEY, 1064, 1000, 0, DIGEST),)},
        {"segments": (SegmentRef(KEY, 1080, 1000, 16, "AB" * 32),)},
        {"root": RootRef()},
        {"root": RootRef(inline=b"x", stored=PartRef(KEY, 16, 100, DIGEST))},
        {"root": RootRef(stored=PartRef(KEY, 15, 100, DIGEST))},
        {"root": RootRef(stored=PartRef("x", 16, 100, DIGEST))},
        {"hot": PartRef(KEY, 16, 0, DIGEST)},
    ],
)
def test_fields_out_of_bounds_are_refused(changes: dict[str, object]) -> None:
    """A head with a right digest is still not believed."""
    data = encode_head(make(**changes))
    with pytest.raises(CorruptionError):
        parse_head(data, "vm1")


def enveloped(inner: bytes) -> bytes:
    return b'{"blake3":"' + digest_of(inner).hex().encode() + b'","head":' + inner + b"}"


@pytest.mark.parametrize(
    "inner",
    [
        encode_head(make(version=2)),
        encode_head(make(incompat=8)),
        enveloped(b'{"format":2,"incompat":0,"group":["other","type"]}'),
    ],
)
def test_a_newer_format_is_refused_with_a_hint(inner: bytes) -> None:
    with pytest.raises(CorruptionError, match="newer version of Silo"):
        parse_head(inner, "vm1")


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_hostile_bytes_end_in_corruption(inner: bytes) -> None:
    for data in (inner, enveloped(inner)):
        with pytest.raises(CorruptionError):
            parse_head(data, "vm1")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(CorruptionError):
        parse_head(enveloped(b"[" * 100000), "vm1")
    with pytest.raises(CorruptionError):
        parse_head(enveloped(b'{"format":1,"x":' + b"[" * 100000), "vm1")
