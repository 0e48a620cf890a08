"""The data inside NBD options and their replies, encoded and decoded for both sides.

Decoders take bytes that a stranger sent. They read nothing outside of them, allocate in proportion to them,
and raise `RemoteProtocolError` for anything malformed; a server turns that into ``ERR_INVALID`` and goes on
parsing. Names are checked here: UTF-8, no NUL, at most `NAME_SIZE_MAX` bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from silo.errors import RemoteProtocolError
from silo.exports.nbd_wire import (
    NAME_SIZE_MAX,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    PAYLOAD_SIZE_DEFAULT,
    Info,
)

__all__ = [
    "BlockSizes",
    "decode_context",
    "decode_context_queries",
    "decode_info_block_size",
    "decode_info_export",
    "decode_info_request",
    "decode_name",
    "decode_server",
    "encode_context",
    "encode_context_queries",
    "encode_info_block_size",
    "encode_info_export",
    "encode_info_request",
    "encode_info_text",
    "encode_option",
    "encode_option_reply",
    "encode_server",
]

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")


@attrs.frozen
class BlockSizes:
    """The size constraints of an export, in bytes."""

    minimum: int
    """Offsets and lengths are multiples of it. A power of two up to 64 KiB."""
    preferred: int
    """Below this, or unaligned to it, requests cost more."""
    maximum: int
    """The largest payload of one request."""

    @property
    def is_unusual(self) -> bool:
        """Whether a client that has not asked would assume something else."""
        return self.minimum > 1 or self.maximum < PAYLOAD_SIZE_DEFAULT


def encode_option(option: int, data: bytes = b"") -> bytes:
    """A client's option."""
    return OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def encode_option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """A server's reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def decode_name(data: bytes) -> str:
    """An export's or context's name."""
    if len(data) > NAME_SIZE_MAX:
        raise RemoteProtocolError(f"a name of {len(data)} bytes is too long")
    if 0 in data:
        raise RemoteProtocolError("a name contains NUL")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RemoteProtocolError("a name is not UTF-8") from error


def _take_name(data: bytes, position: int) -> tuple[str, int]:
    """A name preceded by its 32-bit length, and the position behind it."""
    if position + 4 > len(data):
        raise RemoteProtocolError("the option ends inside the length of a name")
    start = position + 4
    end = start + _U32.unpack_from(data, position)[0]
    if end > len(data):
        raise RemoteProtocolError("a name is longer than its option")
    return decode_name(data[start:end]), end


def _sized(name: str) -> bytes:
    raw = name.encode()
    return _U32.pack(len(raw)) + raw


def encode_info_request(name: str, infos: Sequence[int] = ()) -> bytes:
    """The data of ``INFO`` and ``GO``: an export and what the client wants to know of it."""
    return _sized(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def decode_info_request(data: bytes) -> tuple[str, tuple[int, ...]]:
    """The export's name and the requested kinds of information, unknown ones included."""
    name, position = _take_name(data, 0)
    if position + 2 > len(data):
        raise RemoteProtocolError("the option ends before its list of information requests")
    count = _U16.unpack_from(data, position)[0]
    if position + 2 + 2 * count != len(data):
        raise RemoteProtocolError("the list of information requests does not fill the option")
    return name, struct.unpack_from(f">{count}H", data, position + 2)


def encode_info_export(size: int, flags: int) -> bytes:
    """``INFO_EXPORT``."""
    return _INFO_EXPORT.pack(Info.EXPORT, size, flags)


def decode_info_export(data: bytes) -> tuple[int, int]:
    """Size in bytes and transmission flags."""
    if len(data) != _INFO_EXPORT.size:
        raise RemoteProtocolError(f"INFO_EXPORT has {len(data)} bytes")
    _, size, flags = _INFO_EXPORT.unpack(data)
    return size, flags


def encode_info_block_size(sizes: BlockSizes) -> bytes:
    """``INFO_BLOCK_SIZE``."""
    return _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, sizes.minimum, sizes.preferred, sizes.maximum)


def decode_info_block_size(data: bytes) -> BlockSizes:
    """Size constraints; any that the protocol forbids raises `RemoteProtocolError`."""
    if len(data) != _INFO_BLOCK_SIZE.size:
        raise RemoteProtocolError(f"INFO_BLOCK_SIZE has {len(data)} bytes")
    _, minimum, preferred, maximum = _INFO_BLOCK_SIZE.unpack(data)
    if not 0 < minimum <= 65536 or minimum & (minimum - 1):
        raise RemoteProtocolError(f"the minimum block size {minimum} is not a power of two up to 64 KiB")
    if preferred < max(minimum, 512) or preferred & (preferred - 1) or maximum < preferred:
        raise RemoteProtocolError(f"the block sizes {minimum}, {preferred}, {maximum} contradict one another")
    return BlockSizes(minimum, preferred, maximum)


def encode_info_text(info: Info, text: str) -> bytes:
    """``INFO_NAME`` or ``INFO_DESCRIPTION``."""
    return _U16.pack(info) + text.encode()


def encode_server(name: str, description: str = "") -> bytes:
    """One entry of the answer to ``LIST``."""
    return _sized(name) + description.encode()


def decode_server(data: bytes) -> tuple[str, str]:
    """Name and description of one entry of a list."""
    name, position = _take_name(data, 0)
    return name, decode_name(data[position:])


def encode_context_queries(name: str, queries: Iterable[str]) -> bytes:
    """The data of ``LIST_META_CONTEXT`` and ``SET_META_CONTEXT``."""
    sized = [_sized(query) for query in queries]
    return b"".join((_sized(name), _U32.pack(len(sized)), *sized))


def decode_context_queries(data: bytes) -> tuple[str, list[str]]:
    """Export name and queries."""
    name, position = _take_name(data, 0)
    if position + 4 > len(data):
        raise RemoteProtocolError("the option ends before its number of queries")
    count = _U32.unpack_from(data, position)[0]
    position += 4
    if count > (len(data) - position) // 4:
        raise RemoteProtocolError(f"{count} queries do not fit into the option")
    queries = []
    for _ in range(count):
        query, position = _take_name(data, position)
        queries.append(query)
    if position != len(data):
        raise RemoteProtocolError("bytes follow the last query")
    return name, queries


def encode_context(context_id: int, name: str) -> bytes:
    """``REP_META_CONTEXT``."""
    return _U32.pack(context_id) + name.encode()


def decode_context(data: bytes) -> tuple[int, str]:
    """Identifier and name of a metadata context."""
    if len(data) < 5:
        raise RemoteProtocolError("a metadata context has no name")
    return _U32.unpack_from(data)[0], decode_name(data[4:])
