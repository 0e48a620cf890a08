"""Zero bytes: handing them out and recognising them, without allocating."""

from __future__ import annotations

import functools

from silo.abc import Buffer

__all__ = ["is_zero", "zeros"]

_ZEROS = memoryview(bytes(1 << 20))
"""One shared mebibyte; larger requests (NBD allows 32 MiB) are rare enough to allocate."""


def zeros(length: int) -> memoryview:
    """A read-only view of ``length`` zero bytes."""
    return _ZEROS[:length] if length <= len(_ZEROS) else memoryview(bytes(length))


@functools.lru_cache(maxsize=8)
def _zero_bytes(length: int) -> bytes:
    return bytes(length)


def is_zero(content: Buffer) -> bool:
    """Whether all bytes are zero.

    The first bytes decide nearly always. Else ``bytes`` are compared with ``bytes``, which is a memcmp; a
    comparison of memoryviews goes item by item and is fifty times slower, so a view is copied once.
    """
    view = memoryview(content)
    if any(view[:64]):
        return False
    whole = content if isinstance(content, bytes | bytearray) else bytes(content)
    return whole == _zero_bytes(len(whole))
