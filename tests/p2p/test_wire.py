"""Frames: whole, byte by byte, with more behind them, and hostile."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import LocalProtocolError, RemoteProtocolError
from silo.geometry import CHUNK_SIZE_MAX
from silo.p2p.wire import (
    CHUNK_HEADER_SIZE,
    CONTROL_SIZE_MAX,
    HEADER_SIZE,
    Encoding,
    FrameBuffer,
    FrameType,
    chunk_header,
    frame_header,
    parse_chunk,
)

MIGRATION = bytes(range(16))
DIGEST = bytes(range(32))


def feed(buffer: FrameBuffer, data: bytes, step: int) -> list[tuple[FrameType, bytes]]:
    """Give the buffer at most ``step`` bytes at a time, and collect the frames."""
    found = []
    while data:
        space = buffer.space()
        count = min(len(space), len(data), step)
        space[:count] = data[:count]
        buffer.received(count)
        data = data[count:]
        found += [(frame.type, bytes(frame.payload)) for frame in buffer.frames()]
    return found


def a_stream(number: random.Random) -> tuple[bytes, list[tuple[FrameType, bytes]]]:
    """Some frames of many sizes, as bytes and as what must come out."""
    frames = []
    for _ in range(12):
        type_ = number.choice([FrameType.ACK, FrameType.PART, FrameType.CHUNK, FrameType.HELLO])
        frames.append((type_, number.randbytes(number.choice([0, 1, 11, 12, 13, 100, 5000]))))
    return b"".join(frame_header(type_, len(payload)) + payload for type_, payload in frames), frames


@pytest.mark.parametrize("step", [1, 7, 12, 4096, 1 << 20])
@pytest.mark.parametrize("capacity", [16, 64, 1 << 16])
def test_frames_survive_any_cutting(step, capacity):
    """However the bytes arrive, and however small the buffer began, the same frames come out."""
    data, frames = a_stream(random.Random(f"{step} {capacity}"))
    assert feed(FrameBuffer(capacity), data, step) == frames


@pytest.mark.parametrize("type_", list(FrameType))
def test_limits_hold_on_both_sides(type_):
    """A payload at its limit passes, one byte more is our bug when sent and the peer's when received."""
    limit = 0 if type_ is FrameType.PING else CONTROL_SIZE_MAX
    if type_ is FrameType.CHUNK:
        limit = CHUNK_HEADER_SIZE + CHUNK_SIZE_MAX
    good = frame_header(type_, limit)
    with pytest.raises(LocalProtocolError):
        frame_header(type_, limit + 1)
    buffer = FrameBuffer()
    assert feed(buffer, good, len(good)) == ([(type_, b"")] if limit == 0 else [])
    bad = good[:8] + struct.pack("<I", limit + 1)
    with pytest.raises(RemoteProtocolError):
        feed(FrameBuffer(), bad, len(bad))


@pytest.mark.parametrize("at", range(HEADER_SIZE - 4))
def test_a_wrong_byte_in_the_header_is_refused(at):
    """Magic, version, type and flags are all looked at."""
    data = bytearray(frame_header(FrameType.ACK, 0))
    data[at] ^= 0x80
    with pytest.raises(RemoteProtocolError):
        feed(FrameBuffer(), bytes(data), 64)


@given(st.binary(max_size=200))
def test_garbage_is_a_frame_or_a_protocol_error(data):
    """Arbitrary bytes never raise anything else."""
    try:
        frames = feed(FrameBuffer(64), data, 16)
    except RemoteProtocolError:
        return
    assert all(isinstance(type_, FrameType) for type_, _ in frames)


def test_an_unfinished_frame_does_not_reserve_what_it_claims():
    """A header that announces 4 MiB costs memory only up to the limit of its type, and only once."""
    buffer = FrameBuffer(4096)
    feed(buffer, frame_header(FrameType.CHUNK, CHUNK_HEADER_SIZE + CHUNK_SIZE_MAX), 64)
    assert HEADER_SIZE <= len(buffer.space()) <= CHUNK_HEADER_SIZE + CHUNK_SIZE_MAX
    assert not buffer.is_empty


def test_a_chunk_travels():
    """What goes into a chunk frame comes out of it."""
    header = chunk_header(MIGRATION, 7, 3, 1 << 40, 5, DIGEST, Encoding.RAW)
    ((type_, payload),) = feed(FrameBuffer(), header + b"hello", 3)
    chunk = parse_chunk(memoryview(payload))
    assert type_ is FrameType.CHUNK
    assert chunk[:7] == (MIGRATION, 7, 3, 1 << 40, 5, DIGEST, Encoding.RAW)
    assert chunk.payload == b"hello"


def test_a_zero_chunk_has_no_bytes():
    """A chunk of zeros names its length and carries nothing."""
    header = chunk_header(MIGRATION, 1, 0, 0, 65536, DIGEST, Encoding.ZERO)
    ((_, payload),) = feed(FrameBuffer(), header, 1000)
    assert parse_chunk(memoryview(payload)).payload == b""


@pytest.mark.parametrize(
    ("length", "encoding", "content"),
    [
        (5, Encoding.RAW, b"hell"),
        (5, Encoding.RAW, b"hello!"),
        (5, Encoding.ZERO, b"hello"),
        (0, Encoding.RAW, b""),
        (CHUNK_SIZE_MAX + 1, Encoding.ZERO, b""),
        (5, 2, b"hello"),
        (5, 255, b"hello"),
    ],
)
def test_a_chunk_that_contradicts_itself_is_refused(length, encoding, content):
    """The length in the header, the encoding and the bytes that are there must agree."""
    header = chunk_header(MIGRATION, 1, 0, 0, length, DIGEST, encoding)
    with pytest.raises(RemoteProtocolError):
        parse_chunk(memoryview(header[HEADER_SIZE:] + content))


@pytest.mark.parametrize("size", range(CHUNK_HEADER_SIZE))
def test_a_cut_chunk_header_is_refused(size):
    """A chunk frame shorter than its own header is nobody's chunk."""
    header = chunk_header(MIGRATION, 1, 0, 0, 65536, DIGEST, Encoding.ZERO)[HEADER_SIZE:]
    with pytest.raises(RemoteProtocolError):
        parse_chunk(memoryview(header)[:size])
