"""What an overlay lies over, and how it is recognised.

An overlay says nothing about the bytes that it does not own, so over another base it would be another disk, and a
damaged one. Therefore the base is known by a digest of its content, never by its name.

**The digest** is BLAKE3 over a canonical description: size, and the BLAKE3 of every piece of 1 MiB. It depends on
the bytes alone: a sparse image, a copy of it and the same content spread over several layers have the same one. The
description is in pieces so that holes cost nothing; of the rest every byte is read, once.

**The cache.** A base that has a fingerprint (`silo.devices.readonly.ReadOnlyDevice.fingerprint`) is not read again
while that stays the same: it and the digest are kept in small records, beside the base for all who use it, or, where
that cannot be written, in the folder of the overlay. Losing one costs time. Whoever can write the record beside a
base could as well write the base.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path

import attrs
import msgspec
import numpy as np
from blake3 import blake3

from silo.abc import BlockDevice, Buffer
from silo.chunkmap import runs_of
from silo.devices.readonly import ReadOnlyDevice
from silo.errors import CorruptionError, UnavailableError
from silo.files import replace_file
from silo.records import decode_record, encode_record
from silo.threads import run_to_completion
from silo.zeros import zeros

__all__ = ["Base", "cached_digest", "content_digest"]

PIECE = 1 << 20
_DESCRIPTION = struct.Struct("<16sQ")
"""What it is, and the size. The digests of the pieces follow."""
_RECORD = "digest"


@attrs.frozen
class Base:
    """A device that nobody changes, and its digest."""

    device: BlockDevice
    digest: str

    @classmethod
    async def of(cls, device: BlockDevice) -> Base:
        """Read the whole device to learn its digest. It must not change from now on."""
        return cls(device, await content_digest(device))


class _Known(msgspec.Struct, frozen=True):
    """What a cache holds."""

    fingerprint: str
    digest: str


async def content_digest(device: BlockDevice) -> str:
    """64 hexadecimal digits that stand for the size and every byte of a device.

    Reads all that is not known to be zero. Cancellation leaves nothing behind.
    """
    count = (device.size + PIECE - 1) // PIECE
    holds = np.zeros(count, dtype=np.bool_)
    for offset, length in await device.data_extents():
        holds[offset // PIECE : (offset + length - 1) // PIECE + 1] = True
    holds[-1] = True  # it may be a short one, whose digest is not that of an empty piece
    empty = _digest(zeros(PIECE))
    description = blake3(_DESCRIPTION.pack(b"silo-base-1", device.size))
    position = 0
    for first, limit in runs_of(np.flatnonzero(holds)):
        description.update(empty * (first - position))
        for piece in range(first, limit):
            offset = piece * PIECE
            content = await device.read(offset, min(PIECE, device.size - offset))
            description.update(await run_to_completion(None, _digest, content))
        position = limit
    return description.hexdigest()


def _digest(content: Buffer) -> bytes:
    return blake3(content).digest()


async def cached_digest(device: ReadOnlyDevice, caches: Sequence[Path]) -> str:
    """The digest of a device, from the first of the caches that knows it as it is now, or else from its content.

    What was read is then put into the first cache that can be written. `UnavailableError` when the device changed
    while it was read.
    """
    fingerprint = await device.fingerprint()
    for cache in caches if fingerprint else ():
        known = await run_to_completion(None, _look_up, cache)
        if known is not None and known.fingerprint == fingerprint:
            return known.digest
    digest = await content_digest(device)
    if await device.fingerprint() != fingerprint:
        raise UnavailableError(
            f"{device!r} changed while it was read", hint="a base must stay as it is while it is used"
        )
    if fingerprint:
        await run_to_completion(None, _keep, caches, _Known(fingerprint, digest))
    return digest


def _look_up(cache: Path) -> _Known | None:
    try:
        return msgspec.json.decode(decode_record(_RECORD, cache.read_bytes()), type=_Known)
    except (OSError, CorruptionError, msgspec.DecodeError):
        return None  # not there, not for us, or torn: the content tells


def _keep(caches: Sequence[Path], known: _Known) -> None:
    record = encode_record(_RECORD, msgspec.json.encode(known))
    for cache in caches:
        with contextlib.suppress(OSError):
            replace_file(cache, record)
            return
