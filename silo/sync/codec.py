"""From the content of a chunk to what is stored of it, and back, verified.

A chunk of zeros is stored as nothing. Any other is compressed with zstd at level 1 and stored *raw* unless
that saves at least 5 %. Data that does not compress is found out by compressing it; but the neighbours of a chunk
that did not are tried on a sample first, since they rarely do, and compressing in vain costs as much as
hashing. The digest is BLAKE3 of the plaintext, so it also tells whether a chunk has changed
since it was last committed, before any time is spent on compressing it.

`ChunkEncoder` and `ChunkDecoder` keep the state of the compressor between calls and belong to one thread at a
time. All the heavy calls release the interpreter's lock.
"""

from __future__ import annotations

import enum

import attrs
import zstandard
from blake3 import blake3

from silo.abc import Buffer
from silo.errors import CorruptionError, InvariantError
from silo.sync.cipher import KeyRing
from silo.zeros import is_zero

__all__ = ["DIGEST_SIZE", "LEVEL", "ChunkDecoder", "ChunkEncoder", "Encoded", "Kind", "Place", "digest_of"]

DIGEST_SIZE = 32
SAMPLE = 4 * 1024
"""What is compressed of a chunk to see whether it is worth while, where doubt is due."""

LEVEL = 1
"""Level 3 costs half as much CPU again for files that are 5 % smaller."""


class Kind(enum.IntEnum):
    """What an entry of an index or of a map page says about a chunk."""

    RAW = 1
    """The payload is the content."""
    ZSTD = 2
    """The payload is one zstd frame of the content."""
    ZERO = 3
    """All zeros; there is no payload."""
    INHERIT = 4
    """As in the base image whose digest stands in the entry; there is no payload."""
    DELTA = 5
    """Reserved: changed blocks only."""


@attrs.frozen
class Place:
    """Where a payload is, and what it is for."""

    key: str
    """Of the object."""
    volume: str
    chunk: int


@attrs.frozen
class Encoded:
    """What is stored of one chunk. ``payload`` and ``digest`` are empty for `Kind.ZERO`."""

    kind: Kind
    payload: Buffer
    digest: bytes


ZERO = Encoded(Kind.ZERO, b"", b"")


def digest_of(data: Buffer) -> bytes:
    """BLAKE3 on one thread; parallelism is over chunks."""
    return blake3(data, max_threads=1).digest()


class ChunkEncoder:
    """Turns contents into `Encoded`. One thread at a time."""

    def __init__(self, keys: KeyRing | None = None) -> None:
        self._digest = keys.digest if keys is not None else digest_of
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)

    def encode(
        self, content: Buffer, known: bytes | None = None, *, doubtful: bool = False
    ) -> Encoded | None:
        """What to store of a chunk; ``None`` when its digest is ``known``, so that nothing need be stored.

        The payload may be ``content`` itself, which must therefore not change afterwards. ``doubtful`` content is
        compressed only if a sample of it can be.
        """
        if is_zero(content):
            return ZERO
        digest = self._digest(content)
        if digest == known:
            return None
        if not doubtful or self._sample_compresses(content):
            packed = self._compressor.compress(content)
            if _is_smaller(packed, content):
                return Encoded(Kind.ZSTD, packed, digest)
        return Encoded(Kind.RAW, content, digest)

    def _sample_compresses(self, content: Buffer) -> bool:
        if len(content) < 4 * SAMPLE:
            return True
        start = (len(content) - SAMPLE) // 2
        sample = content[start : start + SAMPLE]
        return _is_smaller(self._compressor.compress(sample), sample)


def _is_smaller(packed: bytes, content: Buffer) -> bool:
    return len(packed) * 20 <= len(content) * 19


class ChunkDecoder:
    """Turns stored payloads back into verified contents. One thread at a time."""

    def __init__(self, keys: KeyRing | None = None) -> None:
        self._keys = keys
        self._decompressor = zstandard.ZstdDecompressor()

    def decode(
        self, kind: int, payload: Buffer, length: int, digest: bytes, place: Place | None = None
    ) -> Buffer:
        """The content of a chunk of ``length`` bytes. Raises `CorruptionError` unless it has this digest.

        ``place`` is where the payload was read and what it is for: without it nothing encrypted can be opened.
        Only for the kinds with a payload. Never allocates more than ``length`` for what hostile bytes claim.
        """
        key_id: int | None = None
        if self._keys is not None:
            if place is None:
                raise InvariantError("an encrypted chunk was read without saying where")
            payload, key_id = self._keys.open_chunk(payload, place.key, place.volume, place.chunk)
        if kind == Kind.ZSTD:
            content: Buffer = self._decompress(payload, length)
        elif kind == Kind.RAW:
            content = payload
        else:
            raise CorruptionError(f"an entry of kind {kind} has no payload that could be read")
        if len(content) != length:
            raise CorruptionError(f"a chunk of {length} bytes is stored as {len(content)}")
        found = digest_of(content) if self._keys is None else self._keys.digest(content, key_id)
        if found != digest:
            raise CorruptionError("the content of a chunk does not have its digest")
        return content

    def _decompress(self, payload: Buffer, length: int) -> bytes:
        try:
            if zstandard.frame_content_size(payload) != length:
                raise CorruptionError(f"a compressed chunk does not claim to have {length} bytes")
            return self._decompressor.decompress(payload, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptionError(f"a compressed chunk cannot be decompressed: {error}") from None
