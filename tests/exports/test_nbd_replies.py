"""Replies, byte for byte, in the three styles of header."""

from __future__ import annotations

from struct import pack

import pytest

from silo.exports.nbd_replies import ChunkedReplies, replies_for, stabilise
from silo.exports.nbd_session import HeaderStyle

COOKIE = 0x1122334455667788
SIMPLE, STRUCTURED, EXTENDED = (replies_for(style) for style in HeaderStyle)


def structured(flags: int, kind: int, payload: bytes = b"", *, more: int = 0) -> bytes:
    return pack(">IHHQI", 0x668E33EF, flags, kind, COOKIE, len(payload) + more) + payload


def extended(flags: int, kind: int, payload: bytes = b"", *, more: int = 0) -> bytes:
    return pack(">IHHQQQ", 0x6E8A278C, flags, kind, COOKIE, 4096, len(payload) + more) + payload


def test_simple_replies():
    """Magic, error, cookie; the data follows by itself."""
    assert SIMPLE.data(COOKIE, 4096, 512) == pack(">IIQ", 0x67446698, 0, COOKIE)
    assert SIMPLE.done(COOKIE, 4096) == pack(">IIQ", 0x67446698, 0, COOKIE)
    assert SIMPLE.error(COOKIE, 4096, 22, "why") == pack(">IIQ", 0x67446698, 22, COOKIE)
    assert not isinstance(SIMPLE, ChunkedReplies)


CHUNKED = [
    pytest.param(STRUCTURED, structured, id="structured"),
    pytest.param(EXTENDED, extended, id="extended"),
]


@pytest.mark.parametrize(("replies", "chunk"), CHUNKED)
def test_whole_replies_are_one_chunk(replies: ChunkedReplies, chunk):
    """Data, success and failure each end the reply with their only chunk; the payload counts its offset."""
    assert replies.data(COOKIE, 4096, 512) == chunk(1, 1, pack(">Q", 4096), more=512)
    assert replies.done(COOKIE, 4096) == chunk(1, 0)
    assert replies.error(COOKIE, 4096, 22, "why") == chunk(1, 0x8001, pack(">IH", 22, 3) + b"why")


@pytest.mark.parametrize(("replies", "chunk"), CHUNKED)
def test_chunks_of_several_do_not_end_the_reply(replies: ChunkedReplies, chunk):
    """Data and holes say where they are; none of them is the last."""
    assert replies.data_chunk(COOKIE, 4096, 8192, 512) == chunk(0, 1, pack(">Q", 8192), more=512)
    assert replies.hole_chunk(COOKIE, 4096, 8192, 512) == chunk(0, 2, pack(">QI", 8192, 512))


def test_status_has_a_chunk_type_of_its_own_in_each_style():
    """32-bit extents in structured replies, a count and 64 bits in extended ones."""
    extents = [(4096, 3), (8192, 0)]
    assert STRUCTURED.status_chunk(COOKIE, 4096, 7, extents) == structured(
        0, 5, pack(">I4I", 7, 4096, 3, 8192, 0)
    )
    assert EXTENDED.status_chunk(COOKIE, 4096, 7, extents) == extended(
        0, 6, pack(">II4Q", 7, 2, 4096, 3, 8192, 0)
    )


def test_stable_parts_no_longer_follow_live_memory():
    """Views become copies, everything else stays what it was."""
    memory = bytearray(b"old")
    header = b"header"
    parts = [header, memoryview(memory)]
    stabilise(parts)
    memory[:] = b"new"
    assert parts[0] is header
    assert parts[1] == b"old"
