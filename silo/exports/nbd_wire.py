"""The NBD protocol's numbers, fixed-size headers and error codes, for both directions.

The authority is ``doc/proto.md`` of the NBD project, with its extended-headers branch. This module knows how
bytes look and nothing about when they may be sent: that is the business of `silo.exports.nbd_handshake` and
`silo.exports.nbd_session` on the server's side and of `silo.exports.nbd_client` on the other. The data inside
options lives in `silo.exports.nbd_options`, the data inside reply chunks in `silo.exports.nbd_chunks`.

Everything on the wire is big-endian. Headers are plain `struct.Struct` objects, because the hot paths
unpack straight from a receive buffer and pack straight into a send list.
"""

from __future__ import annotations

import enum
import errno as _errno
import struct
from typing import Final

from silo.errors import (
    CapacityError,
    ClosedError,
    InvalidRequestError,
    SiloError,
    UnavailableError,
)

__all__ = [
    "CLIENT_FLAGS",
    "EXPORT_NAME_REPLY",
    "EXTENDED_REPLY",
    "EXTENDED_REPLY_MAGIC",
    "EXTENDED_REQUEST",
    "EXTENDED_REQUEST_MAGIC",
    "GREETING",
    "INIT_MAGIC",
    "NAME_SIZE_MAX",
    "OPTION",
    "OPTION_MAGIC",
    "OPTION_REPLY",
    "OPTION_REPLY_MAGIC",
    "PAYLOAD_SIZE_DEFAULT",
    "REQUEST",
    "REQUEST_MAGIC",
    "SIMPLE_REPLY",
    "SIMPLE_REPLY_MAGIC",
    "STRUCTURED_REPLY",
    "STRUCTURED_REPLY_MAGIC",
    "ZERO_PADDING",
    "AllocationStatus",
    "ChunkType",
    "ClientFlag",
    "Command",
    "CommandFlag",
    "HandshakeFlag",
    "Info",
    "NbdError",
    "Option",
    "OptionReply",
    "ReplyFlag",
    "TransmissionFlag",
    "error_from_code",
    "error_to_code",
]

INIT_MAGIC: Final = 0x4E42444D41474943
"""``NBDMAGIC``, the first eight bytes of every connection."""
OPTION_MAGIC: Final = 0x49484156454F5054
"""``IHAVEOPT``: completes the greeting, and starts every option."""
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

NAME_SIZE_MAX: Final = 4096
"""The protocol's limit on every string: export names, context names, error messages."""
PAYLOAD_SIZE_DEFAULT: Final = 32 << 20
"""What a client may assume of a server that announces no limit, and the largest request Linux sends."""
ZERO_PADDING: Final = bytes(124)
"""Follows the answer to ``EXPORT_NAME`` unless the client asked for ``NO_ZEROES``."""

GREETING: Final = struct.Struct(">QQH")
"""INIT_MAGIC, OPTION_MAGIC, handshake flags."""
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")
"""OPTION_MAGIC, option, length of the data that follows."""
OPTION_REPLY: Final = struct.Struct(">QIII")
"""OPTION_REPLY_MAGIC, option, reply type, length of the data that follows."""
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
"""Size in bytes, transmission flags."""

REQUEST: Final = struct.Struct(">IHHQQI")
"""REQUEST_MAGIC, flags, command, cookie, offset, length."""
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
"""EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length."""
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
"""SIMPLE_REPLY_MAGIC, error, cookie."""
STRUCTURED_REPLY: Final = struct.Struct(">IHHQI")
"""STRUCTURED_REPLY_MAGIC, flags, chunk type, cookie, length of the payload."""
EXTENDED_REPLY: Final = struct.Struct(">IHHQQQ")
"""EXTENDED_REPLY_MAGIC, flags, chunk type, cookie, offset of the request, length of the payload."""


class HandshakeFlag(enum.IntFlag):
    """What the server offers in its greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(enum.IntFlag):
    """What the client answers to the greeting. Any other bit ends the connection."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(enum.IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(enum.IntEnum):
    """What a client may ask for before transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(enum.IntEnum):
    """What the server answers to an option. Bit 31 marks an error; its data is a message for people."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


class Info(enum.IntEnum):
    """The pieces of information that ``INFO`` and ``GO`` carry."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(enum.IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """Modifiers of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(enum.IntFlag):
    """Flags of a structured or extended reply chunk."""

    DONE = 1 << 0


class ChunkType(enum.IntEnum):
    """Kinds of structured reply chunks. Bit 15 marks an error."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


class AllocationStatus(enum.IntFlag):
    """Flags of an extent in the ``base:allocation`` context."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class NbdError(enum.IntEnum):
    """The only error codes that may travel."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


_CODE_BY_ERRNO: Final = {
    _errno.EPERM: NbdError.EPERM,
    _errno.EACCES: NbdError.EPERM,
    _errno.EROFS: NbdError.EPERM,
    _errno.EINVAL: NbdError.EINVAL,
    _errno.ENOSPC: NbdError.ENOSPC,
    _errno.EDQUOT: NbdError.ENOSPC,
    _errno.EFBIG: NbdError.ENOSPC,
    _errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def error_to_code(error: BaseException) -> NbdError:
    """The code by which a server reports ``error``: EIO for everything that has no better name."""
    if isinstance(error, SiloError | OSError):
        return _CODE_BY_ERRNO.get(error.errno or 0, NbdError.EIO)
    return NbdError.EIO


def error_from_code(code: int, message: str) -> SiloError:
    """What a client raises for a code that a server sent. An unknown code counts as EINVAL."""
    if code in (NbdError.EIO, NbdError.ENOMEM):
        return UnavailableError(message, hint="the server could not do it; it may be tried again")
    if code == NbdError.ENOSPC:
        return CapacityError(message, hint="no space, or past the end of the export")
    if code == NbdError.ESHUTDOWN:
        return ClosedError(message, hint="the server is shutting down")
    return InvalidRequestError(message, hint="the server refused the request")
