"""What the handshake is told about exports, and what a client may do with one.

Values and one protocol class; the catalogue itself, with its volumes, is `silo.exports.nbd_exports`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, Protocol

import attrs

from silo.exports.nbd_options import BlockSizes
from silo.exports.nbd_session import HeaderStyle
from silo.exports.nbd_wire import TransmissionFlag

__all__ = ["Catalog", "ExportInfo", "TlsPolicy", "transmission_flags"]

_FLAGS_READ_ONLY: Final = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)
_FLAGS_WRITABLE: Final = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_FAST_ZERO
)


class TlsPolicy(enum.Enum):
    """Whether a connection may, or must, be encrypted."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


@attrs.frozen
class ExportInfo:
    """What a client is told about an export."""

    name: str
    """The canonical name."""
    size: int
    sizes: BlockSizes
    read_only: bool = False
    description: str = ""
    contexts: Sequence[str] = ()
    """The metadata contexts that exist for it."""


class Catalog(Protocol):
    """What the handshake asks about exports."""

    def find(self, name: str) -> ExportInfo | None:
        """The export that a client means by ``name``, which may be an alias or empty."""

    def listed(self) -> Sequence[ExportInfo]:
        """All exports."""


def transmission_flags(export: ExportInfo, style: HeaderStyle, *, has_contexts: bool) -> int:
    """What an export can do for a client that agreed to ``style`` and perhaps selected metadata contexts."""
    flags = _FLAGS_READ_ONLY if export.read_only else _FLAGS_WRITABLE
    if style is not HeaderStyle.SIMPLE:
        flags |= TransmissionFlag.SEND_DF
    if style is HeaderStyle.EXTENDED and has_contexts:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return flags
