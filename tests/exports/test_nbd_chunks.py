"""Payloads of reply chunks: what one side encodes the other decodes, and nothing else decodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import RemoteProtocolError
from silo.exports import nbd_chunks as chunks
from silo.exports.nbd_chunks import ErrorChunk

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)


@given(U64, st.integers(1, (1 << 32) - 1))
def test_holes_survive(offset: int, length: int):
    """A hole arrives where it was."""
    assert chunks.decode_offset_hole(chunks.encode_offset_hole(offset, length)) == (offset, length)


@given(st.integers(1, (1 << 32) - 1), st.text(max_size=50), U64)
def test_errors_survive(code: int, message: str, offset: int):
    """An error arrives with its message, and its offset when it has one."""
    message = message.encode(errors="ignore").decode()
    plain = chunks.encode_error(code, message)
    assert chunks.decode_error(plain) == ErrorChunk(code, message)
    placed = chunks.encode_error_offset(code, offset, message)
    assert chunks.decode_error(placed, has_offset=True) == ErrorChunk(code, message, offset)


@given(U32, st.lists(st.tuples(st.integers(1, (1 << 32) - 1), U32), min_size=1, max_size=9))
def test_status_survives(context_id: int, extents: list[tuple[int, int]]):
    """Extents arrive in order, with 32 and with 64 bits."""
    assert chunks.decode_status(chunks.encode_status(context_id, extents)) == (context_id, extents)
    wide = [(length << 20, flags) for length, flags in extents]
    extended = chunks.encode_status_extended(context_id, wide)
    assert chunks.decode_status_extended(extended) == (context_id, wide)


@given(U64, st.lists(U32, max_size=5))
def test_filters_survive(length: int, ids: list[int]):
    """A status request names its extent and any number of contexts."""
    assert chunks.decode_status_filter(chunks.encode_status_filter(length, ids)) == (length, tuple(ids))


def test_long_messages_are_cut_between_characters():
    """A message never exceeds the protocol's 4096 bytes and never ends inside a character."""
    message = chunks.decode_error(chunks.encode_error(5, "é" * 5000)).message
    assert message == "é" * 2048


@pytest.mark.parametrize(
    "payload",
    [b"", b"\0\0\0\5\0", b"\0\0\0\0\0\0", b"\0\0\0\5\0\4abc", b"\0\0\0\5\xff\xff" + bytes(70000)],
    ids=["empty", "short", "no code", "message too long", "message beyond the limit"],
)
def test_contradictory_errors_are_refused(payload: bytes):
    """An error chunk that does not hold together ends the conversation."""
    with pytest.raises(RemoteProtocolError):
        chunks.decode_error(payload)


def test_an_error_without_its_offset_is_refused():
    """``ERROR_OFFSET`` has exactly eight bytes behind the message."""
    with pytest.raises(RemoteProtocolError):
        chunks.decode_error(chunks.encode_error(5, "x"), has_offset=True)


@pytest.mark.parametrize(
    "payload",
    [b"", bytes(4), bytes(11), bytes(13), b"\0\0\0\1" + bytes(8)],
    ids=["empty", "no extent", "cut", "surplus", "empty extent"],
)
def test_broken_status_is_refused(payload: bytes):
    """A status chunk has at least one extent, whole and not empty."""
    with pytest.raises(RemoteProtocolError):
        chunks.decode_status(payload)


@pytest.mark.parametrize(
    "payload",
    [bytes(8), bytes(23), b"\0\0\0\1\0\0\0\2" + b"\1" * 16, b"\0\0\0\1\0\0\0\1" + bytes(16)],
    ids=["no extent", "cut", "wrong count", "empty extent"],
)
def test_broken_extended_status_is_refused(payload: bytes):
    """The count of an extended status chunk agrees with its length."""
    with pytest.raises(RemoteProtocolError):
        chunks.decode_status_extended(payload)


@pytest.mark.parametrize("payload", [b"", bytes(7), bytes(10)])
def test_broken_filters_are_refused(payload: bytes):
    """A status filter is eight bytes and a multiple of four."""
    with pytest.raises(RemoteProtocolError):
        chunks.decode_status_filter(payload)


@pytest.mark.parametrize("payload", [bytes(11), bytes(13), bytes(12)], ids=["short", "long", "empty hole"])
def test_broken_holes_are_refused(payload: bytes):
    """A hole has twelve bytes and covers something."""
    with pytest.raises(RemoteProtocolError):
        chunks.decode_offset_hole(payload)
