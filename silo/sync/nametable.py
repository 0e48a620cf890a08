"""The table of names with which an index, a page and a root begin, so that their entries can be numbers.

::

    count (u32) │ count × { length (u16), ASCII text } │ zeros up to a multiple of eight bytes

Pure. The parser takes untrusted bytes and raises `CorruptionError`, nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from silo.abc import Buffer
from silo.errors import CorruptionError, InvariantError

__all__ = ["NAME_SIZE_MAX", "pack_names", "parse_names"]

_COUNT = struct.Struct("<I")
_LENGTH = struct.Struct("<H")
NAME_SIZE_MAX = 1024
"""The longest key of S3."""


def pack_names(names: Sequence[str]) -> bytes:
    """The table of these names."""
    parts = [_COUNT.pack(len(names))]
    for name in names:
        text = name.encode("ascii")
        if not 0 < len(text) <= NAME_SIZE_MAX:
            raise InvariantError(f"a name of {len(text)} bytes cannot stand in a table")
        parts += (_LENGTH.pack(len(text)), text)
    table = b"".join(parts)
    return table + bytes(-len(table) % 8)


def parse_names(data: Buffer, start: int = 0) -> tuple[tuple[str, ...], int]:
    """``(names, end)`` of the table at ``start``. The names are not empty; nothing else is checked of them."""
    view = memoryview(data)
    if start + _COUNT.size > len(view):
        raise CorruptionError("a table of names is cut short")
    (count,) = _COUNT.unpack_from(view, start)
    at = start + _COUNT.size
    names: list[str] = []
    for _ in range(count):
        if at + _LENGTH.size > len(view):
            raise CorruptionError("a table of names is cut short")
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        if not 0 < length <= NAME_SIZE_MAX or at + length > len(view):
            raise CorruptionError("a name in a table is out of bounds")
        text = bytes(view[at : at + length])
        if not text.isascii():
            raise CorruptionError("a name in a table is not ASCII")
        names.append(text.decode("ascii"))
        at += length
    end = at + (start - at) % 8
    if end > len(view) or any(view[at:end]):
        raise CorruptionError("a table of names does not end as it must")
    return tuple(names), end
