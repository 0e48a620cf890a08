"""Sizes and the arithmetic between them: bytes, blocks, chunks.

A *block* is the smallest unit of guest I/O; a *chunk* is the unit of tracking, transfer and hashing. Chunk
``i`` covers the bytes ``[i * chunk_size, (i + 1) * chunk_size)``, the last one possibly fewer. An *extent*
is a pair ``(offset, length)`` in bytes. A chunk is *touched* by an extent that shares a byte with it, and
*covered* by an extent that contains all of its bytes (the short last chunk counts as covered when all the
bytes that exist are).

Indices, counts and sizes are different things: ``first`` and ``limit`` are chunk indices (``limit`` is
exclusive), ``count`` is a number of chunks, everything without a suffix is bytes.
"""

from __future__ import annotations

from typing import NewType

import attrs

from silo.errors import InvalidRequestError

__all__ = [
    "BLOCK_SIZE_DEFAULT",
    "CHUNK_SIZE_DEFAULT",
    "CHUNK_SIZE_MAX",
    "CHUNK_SIZE_MIN",
    "SIZE_MAX",
    "ChunkIndex",
    "Epoch",
    "Generation",
    "Geometry",
]

ChunkIndex = NewType("ChunkIndex", int)
Epoch = NewType("Epoch", int)
Generation = NewType("Generation", int)

BLOCK_SIZE_DEFAULT = 512
CHUNK_SIZE_DEFAULT = 64 * 1024
CHUNK_SIZE_MIN = 4 * 1024
CHUNK_SIZE_MAX = 4 * 1024 * 1024
SIZE_MAX = 1 << 50
"""1 PiB. With the smallest chunk that is 2^38 chunks, which still fits every 64-bit field of the formats."""


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@attrs.frozen
class Geometry:
    """The size of a volume, in bytes, and how it is divided.

    Raises `InvalidRequestError` when a number is out of its range. ``size`` must be a positive multiple of
    ``block_size``.
    """

    size: int
    chunk_size: int = CHUNK_SIZE_DEFAULT
    block_size: int = BLOCK_SIZE_DEFAULT

    def __attrs_post_init__(self) -> None:
        if not (_power_of_two(self.chunk_size) and CHUNK_SIZE_MIN <= self.chunk_size <= CHUNK_SIZE_MAX):
            raise InvalidRequestError(
                f"chunk size {self.chunk_size} is not usable",
                hint=f"take a power of two from {CHUNK_SIZE_MIN} to {CHUNK_SIZE_MAX}",
            )
        if not (_power_of_two(self.block_size) and 512 <= self.block_size <= CHUNK_SIZE_MIN):
            raise InvalidRequestError(
                f"block size {self.block_size} is not usable", hint="take a power of two from 512 to 4096"
            )
        if not 0 < self.size <= SIZE_MAX or self.size % self.block_size:
            raise InvalidRequestError(
                f"size {self.size} is not usable",
                hint=f"take a positive multiple of {self.block_size} bytes, at most 1 PiB",
            )

    @property
    def chunk_shift(self) -> int:
        """``offset >> chunk_shift`` is the index of the chunk that holds the byte at ``offset``."""
        return self.chunk_size.bit_length() - 1

    @property
    def chunk_count(self) -> int:
        """How many chunks there are, the short last one included."""
        return (self.size + self.chunk_size - 1) >> self.chunk_shift

    def extent_of(self, chunk: int) -> tuple[int, int]:
        """The extent of a chunk; shorter than ``chunk_size`` only for the last one."""
        offset = chunk << self.chunk_shift
        return offset, min(self.chunk_size, self.size - offset)

    def touched(self, offset: int, length: int) -> tuple[int, int]:
        """``(first, limit)`` of the chunks that share a byte with the extent. ``length`` must be positive."""
        shift = self.chunk_shift
        return offset >> shift, ((offset + length - 1) >> shift) + 1

    def covered(self, offset: int, length: int) -> tuple[int, int]:
        """``(first, limit)`` of the chunks all of whose bytes lie in the extent; empty when ``limit <= first``."""
        shift = self.chunk_shift
        end = offset + length
        limit = self.chunk_count if end == self.size else end >> shift
        return (offset + self.chunk_size - 1) >> shift, limit

    def check_extent(self, offset: int, length: int) -> None:
        """Raise `InvalidRequestError` unless the extent lies inside the volume. An empty extent is inside."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InvalidRequestError(
                f"extent {offset}+{length} lies outside the volume of {self.size} bytes"
            )
