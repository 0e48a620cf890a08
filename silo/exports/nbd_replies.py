"""How a server answers requests, in the three styles of header that can be negotiated.

A reply is a few ``bytes`` that go out in front of the data, if there is data: the data itself is never
copied here. One style is chosen per connection, after the handshake; the rest of the server asks it for
headers and does not look at which one it is, except to learn whether it is one of the `ChunkedReplies`.

``cookie`` and ``offset`` are those of the request: the cookie is opaque and returned as it came, the offset is
repeated in extended headers.
"""

from __future__ import annotations

import abc
import struct
from collections.abc import Sequence
from typing import Final

from silo.abc import Buffer
from silo.exports.nbd_chunks import (
    OFFSET,
    encode_error,
    encode_offset_hole,
    encode_status,
    encode_status_extended,
)
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import (
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    ReplyFlag,
)

__all__ = [
    "ChunkedReplies",
    "ExtendedReplies",
    "Replies",
    "SimpleReplies",
    "StructuredReplies",
    "replies_for",
]

_DONE: Final = int(ReplyFlag.DONE)
_DATA: Final = int(ChunkType.OFFSET_DATA)

# The header of a chunk, its first fields as one word; with data, the offset that starts the payload follows.
_STRUCTURED_HEAD: Final = struct.Struct(">QQI")
_STRUCTURED_DATA: Final = struct.Struct(">QQIQ")
_EXTENDED_HEAD: Final = struct.Struct(">QQQQ")
_EXTENDED_DATA: Final = struct.Struct(">QQQQQ")


def _word(magic: int, flags: int, kind: int) -> int:
    """The first eight bytes of a chunk as a number."""
    return magic << 32 | flags << 16 | kind


_STRUCTURED_DATA_LAST: Final = _word(STRUCTURED_REPLY_MAGIC, _DONE, _DATA)
_STRUCTURED_DATA_MORE: Final = _word(STRUCTURED_REPLY_MAGIC, 0, _DATA)
_STRUCTURED_DONE: Final = _word(STRUCTURED_REPLY_MAGIC, _DONE, int(ChunkType.NONE))
_EXTENDED_DATA_LAST: Final = _word(EXTENDED_REPLY_MAGIC, _DONE, _DATA)
_EXTENDED_DATA_MORE: Final = _word(EXTENDED_REPLY_MAGIC, 0, _DATA)
_EXTENDED_DONE: Final = _word(EXTENDED_REPLY_MAGIC, _DONE, int(ChunkType.NONE))


class Replies(abc.ABC):
    """One style of answering."""

    @abc.abstractmethod
    def data(self, cookie: int, offset: int, length: int) -> bytes:
        """What precedes the ``length`` bytes that answer a read completely."""

    @abc.abstractmethod
    def done(self, cookie: int, offset: int) -> bytes:
        """Success without data."""

    @abc.abstractmethod
    def error(self, cookie: int, offset: int, code: int, message: str) -> bytes:
        """Failure. ``message`` is for people and travels only in styles that have room for it."""


class ChunkedReplies(Replies):
    """A style whose replies can have several chunks, and so holes, block status and messages for people.

    A reply made of chunks ends with `done` or `error`.
    """

    @abc.abstractmethod
    def data_chunk(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        """What precedes the ``length`` bytes from ``start`` on, as one chunk of several."""

    @abc.abstractmethod
    def hole_chunk(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        """The ``length`` bytes from ``start`` on are zeros: one chunk of several."""

    @abc.abstractmethod
    def status_chunk(
        self, cookie: int, offset: int, context_id: int, extents: Sequence[tuple[int, int]]
    ) -> bytes:
        """``(length, flags)`` of consecutive extents in one metadata context: one chunk of several."""


class SimpleReplies(Replies):
    """Sixteen bytes: magic, error, cookie."""

    def data(self, cookie: int, offset: int, length: int) -> bytes:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def done(self, cookie: int, offset: int) -> bytes:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, code: int, message: str) -> bytes:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, code, cookie)


class StructuredReplies(ChunkedReplies):
    """Chunks with headers of twenty bytes."""

    def data(self, cookie: int, offset: int, length: int) -> bytes:
        return _STRUCTURED_DATA.pack(_STRUCTURED_DATA_LAST, cookie, length + 8, offset)

    def done(self, cookie: int, offset: int) -> bytes:
        return _STRUCTURED_HEAD.pack(_STRUCTURED_DONE, cookie, 0)

    def error(self, cookie: int, offset: int, code: int, message: str) -> bytes:
        return self._chunk(_DONE, ChunkType.ERROR, cookie, encode_error(code, message))

    def data_chunk(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        return _STRUCTURED_DATA.pack(_STRUCTURED_DATA_MORE, cookie, length + 8, start)

    def hole_chunk(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        return self._chunk(0, ChunkType.OFFSET_HOLE, cookie, encode_offset_hole(start, length))

    def status_chunk(
        self, cookie: int, offset: int, context_id: int, extents: Sequence[tuple[int, int]]
    ) -> bytes:
        return self._chunk(0, ChunkType.BLOCK_STATUS, cookie, encode_status(context_id, extents))

    def _chunk(self, flags: int, kind: ChunkType, cookie: int, payload: bytes) -> bytes:
        return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload


class ExtendedReplies(ChunkedReplies):
    """Chunks with headers of 32 bytes and 64-bit lengths."""

    def data(self, cookie: int, offset: int, length: int) -> bytes:
        return _EXTENDED_DATA.pack(_EXTENDED_DATA_LAST, cookie, offset, length + 8, offset)

    def done(self, cookie: int, offset: int) -> bytes:
        return _EXTENDED_HEAD.pack(_EXTENDED_DONE, cookie, offset, 0)

    def error(self, cookie: int, offset: int, code: int, message: str) -> bytes:
        return self._chunk(_DONE, ChunkType.ERROR, cookie, offset, encode_error(code, message))

    def data_chunk(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        return _EXTENDED_DATA.pack(_EXTENDED_DATA_MORE, cookie, offset, length + OFFSET.size, start)

    def hole_chunk(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        return self._chunk(0, ChunkType.OFFSET_HOLE, cookie, offset, encode_offset_hole(start, length))

    def status_chunk(
        self, cookie: int, offset: int, context_id: int, extents: Sequence[tuple[int, int]]
    ) -> bytes:
        payload = encode_status_extended(context_id, extents)
        return self._chunk(0, ChunkType.BLOCK_STATUS_EXT, cookie, offset, payload)

    def _chunk(self, flags: int, kind: ChunkType, cookie: int, offset: int, payload: bytes) -> bytes:
        return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(payload)) + payload


_STYLES: Final = {
    HeaderStyle.SIMPLE: SimpleReplies(),
    HeaderStyle.STRUCTURED: StructuredReplies(),
    HeaderStyle.EXTENDED: ExtendedReplies(),
}


def replies_for(style: HeaderStyle) -> Replies:
    """The replies that go with what was negotiated. They hold no state and are shared."""
    return _STYLES[style]


def stabilise(parts: list[Buffer]) -> None:
    """Replace views of live memory by copies of what they show now."""
    for index, part in enumerate(parts):
        if type(part) is memoryview:
            parts[index] = bytes(part)
