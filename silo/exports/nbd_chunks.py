"""The payloads of NBD's structured and extended reply chunks, encoded and decoded for both sides.

A reply of those kinds is a series of chunks, each a header (see `silo.exports.nbd_wire`) and one of the
payloads here; the last carries ``ReplyFlag.DONE``. Decoders take a stranger's bytes and raise
`RemoteProtocolError` for anything that does not hold together.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import attrs

from silo.abc import Buffer
from silo.errors import RemoteProtocolError
from silo.exports.nbd_wire import NAME_SIZE_MAX

__all__ = [
    "OFFSET",
    "ErrorChunk",
    "decode_error",
    "decode_offset_hole",
    "decode_status",
    "decode_status_extended",
    "decode_status_filter",
    "encode_error",
    "encode_error_offset",
    "encode_offset_hole",
    "encode_status",
    "encode_status_extended",
    "encode_status_filter",
]

OFFSET: Final = struct.Struct(">Q")
"""Precedes the bytes of an ``OFFSET_DATA`` chunk."""
_HOLE: Final = struct.Struct(">QI")
_ERROR: Final = struct.Struct(">IH")
_CONTEXT: Final = struct.Struct(">I")
_CONTEXT_COUNT: Final = struct.Struct(">II")


@attrs.frozen
class ErrorChunk:
    """What an error chunk says."""

    code: int
    message: str
    offset: int | None = None
    """Where it happened, if the server knew."""


def encode_offset_hole(offset: int, length: int) -> bytes:
    """``OFFSET_HOLE``: the extent reads as zeros."""
    return _HOLE.pack(offset, length)


def decode_offset_hole(payload: Buffer) -> tuple[int, int]:
    """Offset and length of a hole."""
    if len(payload) != _HOLE.size:
        raise RemoteProtocolError(f"a hole chunk has {len(payload)} bytes")
    offset, length = _HOLE.unpack(payload)
    if not length:
        raise RemoteProtocolError("a hole chunk is empty")
    return offset, length


def _cut(message: str) -> bytes:
    """A message within the protocol's limit, never split inside a character."""
    return message.encode()[:NAME_SIZE_MAX].decode(errors="ignore").encode()


def encode_error(code: int, message: str = "") -> bytes:
    """``ERROR``."""
    raw = _cut(message)
    return _ERROR.pack(code, len(raw)) + raw


def encode_error_offset(code: int, offset: int, message: str = "") -> bytes:
    """``ERROR_OFFSET``: the error happened at ``offset``."""
    return encode_error(code, message) + OFFSET.pack(offset)


def decode_error(payload: Buffer, *, has_offset: bool = False) -> ErrorChunk:
    """Any error chunk; of an unknown kind only the code and the message are taken."""
    if len(payload) < _ERROR.size:
        raise RemoteProtocolError(f"an error chunk has {len(payload)} bytes")
    code, size = _ERROR.unpack_from(payload)
    end = _ERROR.size + size
    if not code or size > NAME_SIZE_MAX or end > len(payload):
        raise RemoteProtocolError("an error chunk contradicts itself")
    message = bytes(payload[_ERROR.size : end]).decode(errors="replace")
    if not has_offset:
        return ErrorChunk(code, message)
    if len(payload) != end + OFFSET.size:
        raise RemoteProtocolError("an error chunk lacks its offset")
    return ErrorChunk(code, message, OFFSET.unpack_from(payload, end)[0])


def encode_status(context_id: int, extents: Sequence[tuple[int, int]]) -> bytes:
    """``BLOCK_STATUS``: ``(length, flags)`` of consecutive extents in one context, 32 bits each."""
    numbers = [number for extent in extents for number in extent]
    return struct.pack(f">I{len(numbers)}I", context_id, *numbers)


def encode_status_extended(context_id: int, extents: Sequence[tuple[int, int]]) -> bytes:
    """``BLOCK_STATUS_EXT``: the same with 64 bits each."""
    numbers = [number for extent in extents for number in extent]
    return struct.pack(f">II{len(numbers)}Q", context_id, len(extents), *numbers)


def _extents(numbers: Sequence[int]) -> list[tuple[int, int]]:
    extents = list(zip(numbers[::2], numbers[1::2], strict=True))
    if not all(length for length, _ in extents):
        raise RemoteProtocolError("a status chunk has an empty extent")
    return extents


def decode_status(payload: Buffer) -> tuple[int, list[tuple[int, int]]]:
    """Context and extents of a ``BLOCK_STATUS`` chunk."""
    count, rest = divmod(len(payload) - _CONTEXT.size, 8)
    if count < 1 or rest:
        raise RemoteProtocolError(f"a status chunk has {len(payload)} bytes")
    context_id, *numbers = struct.unpack(f">I{2 * count}I", payload)
    return context_id, _extents(numbers)


def decode_status_extended(payload: Buffer) -> tuple[int, list[tuple[int, int]]]:
    """Context and extents of a ``BLOCK_STATUS_EXT`` chunk."""
    count, rest = divmod(len(payload) - _CONTEXT_COUNT.size, 16)
    if count < 1 or rest:
        raise RemoteProtocolError(f"an extended status chunk has {len(payload)} bytes")
    context_id, claimed, *numbers = struct.unpack(f">II{2 * count}Q", payload)
    if claimed != count:
        raise RemoteProtocolError(f"an extended status chunk claims {claimed} extents and has {count}")
    return context_id, _extents(numbers)


def encode_status_filter(length: int, context_ids: Sequence[int]) -> bytes:
    """The payload of a ``BLOCK_STATUS`` request: effect length, and the contexts wanted."""
    return struct.pack(f">Q{len(context_ids)}I", length, *context_ids)


def decode_status_filter(payload: Buffer) -> tuple[int, tuple[int, ...]]:
    """Effect length and context identifiers; the caller checks whether it knows them."""
    count, rest = divmod(len(payload) - OFFSET.size, 4)
    if count < 0 or rest:
        raise RemoteProtocolError(f"a status filter has {len(payload)} bytes")
    length, *context_ids = struct.unpack(f">Q{count}I", payload)
    return length, tuple(context_ids)
