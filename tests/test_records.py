"""Records and identities: that they come back, and that no damage gets through."""

from __future__ import annotations

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import CorruptionError, InvalidRequestError
from silo.geometry import Geometry
from silo.records import (
    Identity,
    VolumeGeometry,
    check_record_name,
    decode_identity,
    decode_record,
    encode_identity,
    encode_record,
)

IDENTITY = Identity(
    group="vm1",
    epoch=17,
    incarnation="00ff" * 4,
    register="s3://bucket/prod",
    volumes=(VolumeGeometry("disk", 1 << 30, 65536, 512),),
    owner="owner",
)


@given(st.binary(max_size=300))
def test_a_record_comes_back(content: bytes) -> None:
    assert decode_record("offer", encode_record("offer", content)) == content


def test_a_record_can_be_read_by_people() -> None:
    line, content = encode_record("offer", b'{"to": "hostb"}').split(b"\n")
    assert line.startswith(b"silo-record 1 offer 15 ")
    assert content == b'{"to": "hostb"}'


def test_no_damage_gets_through() -> None:
    """Cut anywhere, flipped anywhere, with anything behind it, or under another name."""
    whole = encode_record("offer", b"some content\n")
    for length in range(len(whole)):
        with pytest.raises(CorruptionError):
            decode_record("offer", whole[:length])
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            with pytest.raises(CorruptionError):
                decode_record("offer", bytes(damaged))
    with pytest.raises(CorruptionError):
        decode_record("offer", whole + b"x")
    with pytest.raises(CorruptionError, match="was written as offer"):
        decode_record("handover", whole)


def test_a_record_of_a_later_format_is_refused_as_such() -> None:
    line = f"silo-record 2 offer 1 {blake3(b'x').hexdigest()}\n".encode()
    with pytest.raises(CorruptionError, match="newer version"):
        decode_record("offer", line + b"x")


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    for hostile in (data, b"silo-record 1 offer " + data):
        with pytest.raises(CorruptionError):
            decode_record("offer", hostile)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "1st", ".offer", "a" * 65, "offer\n", "ö"])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_record_name(name)


def test_an_identity_comes_back() -> None:
    assert decode_identity("vm1", encode_identity(IDENTITY)) == IDENTITY
    assert IDENTITY.volumes[0].geometry == Geometry(1 << 30)


@pytest.mark.parametrize(
    "register",
    ["s3://key:secret@bucket/prod", "https://s3.example/bucket?X-Amz-Signature=abc", "s3://bucket#token"],
)
def test_secrets_do_not_get_into_an_identity(register: str) -> None:
    with pytest.raises(InvalidRequestError, match="more than a place") as caught:
        encode_identity(msgspec.structs.replace(IDENTITY, register=register))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "makes no sense"),
        (b"[]", "makes no sense"),
        (b"\xff\xfe", "makes no sense"),
        (b'{"group": "vm1"}', "makes no sense"),
        (b'{"group": "vm1", "epoch": "3", "incarnation": ""}', "makes no sense"),
        (b'{"group": "vm1", "epoch": 3, "incarnation": "", "format": 2}', "newer version|cannot be read"),
        (b'{"group": "vm2", "epoch": 3, "incarnation": ""}', "is that of vm2"),
    ],
)
def test_an_identity_that_makes_no_sense_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(CorruptionError, match=message):
        decode_identity("vm1", content)
