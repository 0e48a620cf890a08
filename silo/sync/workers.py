"""Threads that hash, compress, decompress and verify, a batch of chunks per call.

The compressors keep state and serve one thread at a time, so each call takes one from a pile and puts it back;
there are never more of them than threads. `list.pop` and `append` are atomic.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import attrs

from silo.abc import Buffer
from silo.errors import CorruptionError
from silo.sync.cipher import KeyRing, Sealer
from silo.sync.codec import ChunkDecoder, ChunkEncoder, Encoded, Kind, Place
from silo.sync.segment import Segment, SegmentBuilder
from silo.threads import run_to_completion

__all__ = ["Stored", "Workers"]


@attrs.frozen
class Stored:
    """A payload as it was read, with what its entry says about it."""

    kind: int
    payload: Buffer
    length: int
    """Of the content."""
    digest: bytes
    place: Place | None = None
    """Needed for what is encrypted."""


class Workers:
    """See the module. Concurrent calls share the threads. `close` when all calls have ended."""

    def __init__(self, threads: int, name: str = "silo-sync", keys: KeyRing | None = None) -> None:
        self._keys = keys
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._encoders: list[ChunkEncoder] = []
        self._decoders: list[ChunkDecoder] = []

    async def encode(self, contents: Sequence[Buffer], known: Sequence[bytes | None]) -> list[Encoded | None]:
        """What to store of each content; ``None`` where its digest is the known one. See `ChunkEncoder`.

        Payloads are views of their contents only where most of the batch is kept by that.
        """
        return await run_to_completion(self._executor, self._encode, contents, known)

    async def decode(self, batch: Sequence[Stored]) -> list[Buffer | CorruptionError]:
        """The verified contents; an error stands where a content could not be had, and harms no other."""
        return await run_to_completion(self._executor, self._decode, batch)

    async def seal(self, builder: SegmentBuilder, sealer: Sealer) -> Segment:
        """The finished, encrypted segment."""
        return await run_to_completion(self._executor, builder.seal, sealer)

    def close(self) -> None:
        """Let the threads end."""
        self._executor.shutdown(wait=True)

    def _encode(self, contents: Sequence[Buffer], known: Sequence[bytes | None]) -> list[Encoded | None]:
        encoder = self._encoders.pop() if self._encoders else ChunkEncoder(self._keys)
        encoded: list[Encoded | None] = []
        doubtful = False  # decided within the batch, so that the same batch is always stored alike
        try:
            for content, digest in zip(contents, known, strict=True):
                made = encoder.encode(content, digest, doubtful=doubtful)
                if made is not None and made.kind is not Kind.ZERO:
                    doubtful = made.kind is Kind.RAW
                encoded.append(made)
            return _unpinned(encoded, sum(map(len, contents)))
        finally:
            self._encoders.append(encoder)

    def _decode(self, batch: Sequence[Stored]) -> list[Buffer | CorruptionError]:
        decoder = self._decoders.pop() if self._decoders else ChunkDecoder(self._keys)
        try:
            return [_decode_one(decoder, stored) for stored in batch]
        finally:
            self._decoders.append(decoder)


def _unpinned(encoded: list[Encoded | None], size: int) -> list[Encoded | None]:
    """The same, without payloads that are views of the contents when they are few: a few chunks that do not compress
    would keep the memory of a whole batch, for as long as the segment takes to which they go."""
    raw = [one for one in encoded if one is not None and one.kind is Kind.RAW]
    if 2 * sum(len(one.payload) for one in raw) >= size:
        return encoded
    return [
        attrs.evolve(one, payload=bytes(one.payload)) if one is not None and one.kind is Kind.RAW else one
        for one in encoded
    ]


def _decode_one(decoder: ChunkDecoder, stored: Stored) -> Buffer | CorruptionError:
    try:
        return decoder.decode(stored.kind, stored.payload, stored.length, stored.digest, stored.place)
    except CorruptionError as error:
        return error
