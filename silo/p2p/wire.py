"""Frames between two hosts: how the bytes of the peer protocol are cut into pieces.

A connection carries frames in both directions and nothing else. A frame is a header of 12 bytes and a
payload (everything little-endian)::

    magic "SILO" | version u8 | type u8 | flags u16 = 0 | payload length u32

Payloads come in three kinds. A *chunk* frame has a fixed header of 68 bytes and then the content as it is, so
that content is never copied through a serializer. A *part* frame is raw bytes of something larger. All other
frames hold one msgpack map each, see `silo.p2p.messages`.

This module knows sizes and limits and nothing about meaning or order: the order is the business of
`silo.p2p.conversation`. Hostile bytes end in `RemoteProtocolError` and in nothing else, and no length from the
wire is believed before it was compared with the limit of its type. ``docs/formats/peer.md`` has the bytes.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from silo.abc import Buffer
from silo.errors import LocalProtocolError, RemoteProtocolError
from silo.geometry import CHUNK_SIZE_MAX

__all__ = [
    "CHUNK_HEADER_SIZE",
    "CONTROL_SIZE_MAX",
    "DIGEST_SIZE",
    "HEADER_SIZE",
    "MIGRATION_ID_SIZE",
    "PART_SIZE_MAX",
    "ChunkFrame",
    "Encoding",
    "Frame",
    "FrameBuffer",
    "FrameType",
    "chunk_header",
    "frame_header",
    "parse_chunk",
]

MAGIC: Final = b"SILO"
VERSION: Final = 1
"""Of the framing. What the frames mean is negotiated in HELLO, which therefore can always be read."""

_TLS_RECORDS: Final = (b"\x16\x03", b"\x15\x03")
"""How a TLS handshake begins, and how a TLS server answers what is none."""

_HEADER: Final = struct.Struct("<4sBBHI")
HEADER_SIZE: Final = _HEADER.size

MIGRATION_ID_SIZE: Final = 16
DIGEST_SIZE: Final = 32

_CHUNK: Final = struct.Struct("<16sIHBBQI32s")
"""Migration id, round, volume, encoding, reserved = 0, chunk, length of the content, digest of the content."""
_CHUNK_FRAME: Final = struct.Struct("<4sBBHI16sIHBBQI32s")
CHUNK_HEADER_SIZE: Final = _CHUNK.size

CONTROL_SIZE_MAX: Final = 1 << 20
"""The largest control message is a window of a chunk set: 2^20 chunks, one bit each, plus its frame."""
PART_SIZE_MAX: Final = 1 << 20


class FrameType(enum.IntEnum):
    """What a frame is. Its direction and its place are in `silo.p2p.conversation`."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    OFFER = 4
    ACCEPT = 5
    HEAT = 6
    INVALIDATE = 7
    ZEROS = 8
    CHUNK = 9
    ACK = 10
    PART = 11
    HANDOVER = 12
    TAKEN = 13
    DECLINED = 14
    WITHDRAW = 15
    NEED = 16
    NEED_END = 17
    DRAINED = 18
    EVACUATED = 19
    RELEASED = 20
    WANT = 21
    UNAVAILABLE = 22
    PING = 23
    AT_WORK = 24
    ROUND = 25


class Encoding(enum.IntEnum):
    """How the content of a chunk travels. Values above these need a feature bit that both sides announced."""

    RAW = 0
    ZERO = 1
    """All zeros: no bytes follow."""
    ZSTD = 2
    """One zstd frame of the content, shorter than that. Needs `silo.p2p.messages.FEATURE_ZSTD`."""


_LIMITS: Final[dict[int, int]] = {
    **dict.fromkeys(map(int, FrameType), CONTROL_SIZE_MAX),
    FrameType.CHUNK: CHUNK_HEADER_SIZE + CHUNK_SIZE_MAX,
    FrameType.PART: PART_SIZE_MAX,
    FrameType.PING: 0,
}


class Frame(NamedTuple):
    """A whole frame. The payload is a view of the receive buffer, valid until more bytes are received."""

    type: FrameType
    payload: memoryview


class ChunkFrame(NamedTuple):
    """A chunk on its way: which one, as of which round, and what its bytes must hash to."""

    migration: bytes
    round: int
    volume: int
    """Index into the volumes of the offer."""
    chunk: int
    length: int
    """Of the content, which for a zero chunk is not there."""
    digest: bytes
    encoding: Encoding
    payload: memoryview


def frame_header(type_: FrameType, length: int) -> bytes:
    """The header of a frame with ``length`` bytes of payload. `LocalProtocolError` above the type's limit."""
    if length > _LIMITS[type_]:
        raise LocalProtocolError(
            f"a {type_.name} frame of {length} bytes exceeds its limit of {_LIMITS[type_]}"
        )
    return _HEADER.pack(MAGIC, VERSION, type_, 0, length)


def chunk_header(
    migration: bytes,
    round_: int,
    volume: int,
    chunk: int,
    length: int,
    digest: bytes,
    encoding: Encoding,
    packed: int = 0,
) -> bytes:
    """Everything of a chunk frame that precedes its content. ``packed`` is the size of a compressed one."""
    payload = length if encoding == Encoding.RAW else packed
    return _CHUNK_FRAME.pack(
        MAGIC, VERSION, FrameType.CHUNK, 0, CHUNK_HEADER_SIZE + payload,
        migration, round_, volume, encoding, 0, chunk, length, digest,
    )  # fmt: skip


def parse_chunk(payload: memoryview) -> ChunkFrame:
    """The payload of a CHUNK frame. Checks what can be checked without knowing the volumes.

    `RemoteProtocolError` for an unknown encoding, or a length that the payload does not have.
    """
    if len(payload) < CHUNK_HEADER_SIZE:
        raise RemoteProtocolError(f"a chunk frame of {len(payload)} bytes is too short for its header")
    migration, round_, volume, encoding, reserved, chunk, length, digest = _CHUNK.unpack_from(payload)
    content = payload[CHUNK_HEADER_SIZE:]
    if encoding == Encoding.RAW:
        expected = length
    elif encoding == Encoding.ZSTD and 0 < len(content) < length:
        expected = len(content)
    elif encoding == Encoding.ZERO:
        expected = 0
    else:
        raise RemoteProtocolError(f"a chunk came in encoding {encoding}, which nobody has agreed on")
    if len(content) != expected or not 0 < length <= CHUNK_SIZE_MAX or reserved:
        raise RemoteProtocolError(f"a chunk of {length} bytes came with {len(content)} bytes of content")
    return ChunkFrame(migration, round_, volume, chunk, length, digest, Encoding(encoding), content)


def _check_magic(start: Buffer) -> None:
    """As much of it as there is: who speaks something else may never say enough for a header."""
    found = bytes(start)
    if found[:2] in _TLS_RECORDS:
        raise RemoteProtocolError(
            "the other host speaks TLS, and this one does not",
            hint="give this host its certificate (--tls-dir; `silo certs` makes it)",
        )
    if found != MAGIC[: len(found)]:
        raise RemoteProtocolError(
            f"expected a frame, got {found!r}", hint="is it really Silo that speaks there?"
        )


def _check_header(header: Buffer, offset: int) -> tuple[FrameType, int]:
    magic, version, kind, flags, length = _HEADER.unpack_from(header, offset)
    _check_magic(magic)
    if version != VERSION:
        raise RemoteProtocolError(
            f"expected a frame of version {VERSION}, got version {version}", hint="update the older host"
        )
    limit = _LIMITS.get(kind)
    if limit is None or flags:
        raise RemoteProtocolError(f"a frame of type {kind} with flags {flags:#x} is unknown")
    if length > limit:
        raise RemoteProtocolError(
            f"a {FrameType(kind).name} frame of {length} bytes exceeds its limit of {limit}"
        )
    return FrameType(kind), length


class FrameBuffer:
    """Turns received bytes into frames without copying their payloads.

    ``space`` is where the next bytes go, ``received`` says how many came, ``frames`` hands out what is whole.
    After a `RemoteProtocolError` the buffer is of no more use: there is no way to find the next frame.
    """

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._bytes = memoryview(bytearray(max(capacity, HEADER_SIZE)))
        self._start = 0
        self._end = 0

    def space(self) -> memoryview:
        """Room for at least one more byte. Payloads handed out before are no longer valid."""
        need = HEADER_SIZE
        have = self._end - self._start
        if have >= HEADER_SIZE:
            need = HEADER_SIZE + _check_header(self._bytes, self._start)[1]
        if need > len(self._bytes):
            larger = memoryview(bytearray(need))
            larger[:have] = self._bytes[self._start : self._end]
            self._bytes = larger
            self._start, self._end = 0, have
        elif self._start + need > len(self._bytes) or len(self._bytes) - self._end < len(self._bytes) // 2:
            # Through a copy, as the two places may overlap. Less than a frame is left, so this is cheap
            # beside what a receive into half of the buffer saves.
            self._bytes[:have] = bytes(self._bytes[self._start : self._end])
            self._start, self._end = 0, have
        return self._bytes[self._end :]

    def received(self, count: int) -> None:
        """``count`` bytes were put at the start of `space`."""
        self._end += count

    @property
    def is_empty(self) -> bool:
        """No part of a frame is left: here a connection may end."""
        return self._start == self._end

    def frames(self) -> Iterator[Frame]:
        """The whole frames that are there, each only once. Raises `RemoteProtocolError` at the first bad one."""
        while self._end - self._start >= HEADER_SIZE:
            kind, length = _check_header(self._bytes, self._start)
            first = self._start + HEADER_SIZE
            if first + length > self._end:
                return
            self._start = first + length
            yield Frame(kind, self._bytes[first : first + length])
        _check_magic(self._bytes[self._start : min(self._end, self._start + len(MAGIC))])
