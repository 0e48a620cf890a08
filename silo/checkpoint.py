"""The durable form of a volume's map: which chunks its device may be believed about after a power loss.

The mapped bytes of `silo.mapfile` survive the death of a process and nothing more. What survives the machine is
a *checkpoint*, written after the device was flushed (safety rule 9). It keeps of every chunk only what stays true
whatever part of the later writes reached the disk:

=============  =====================================  ==========================================
in the map     in the checkpoint                      after the power loss
=============  =====================================  ==========================================
ABSENT_STORE   ABSENT_STORE                           the same: it was not flushed since
ABSENT_PEER    ABSENT_PEER                            the same, and dirty: the store lacks it
ZERO, PRESENT  LOCAL: the device has the content      PRESENT and dirty: to be compared
ZERO_UNPUNCHED UNPUNCHED: zeros, the device has       ZERO_UNPUNCHED and dirty
               something else
=============  =====================================  ==========================================

ZERO and PRESENT are one, so a guest that writes to a fresh disk and flushes does not have to wait for a
checkpoint: only the transitions out of the other three need one before the flush may return. Dirty bits are not
kept; everything local is compared with the manifest instead.

The format: a header, the classes of all chunks (as runs, or as two bits each when that is shorter), and the
BLAKE3 digest of both. Two files take turns, the higher sequence number counts, and a torn one has no valid
digest. This module only translates; `silo.volumestate` reads and writes. It is specified in
``docs/formats/state.md``.
"""

from __future__ import annotations

import enum
import struct

import attrs
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from silo.abc import Buffer
from silo.chunkmap import RESIDENCY_MASK, SYNC_DIRTY, Residency
from silo.errors import CorruptionError, InvalidRequestError, InvariantError
from silo.geometry import Geometry

__all__ = [
    "Checkpoint",
    "Kept",
    "decode_checkpoint",
    "encode_checkpoint",
    "kept_of",
    "owner_tag",
    "states_after_power_loss",
]

States = npt.NDArray[np.uint8]

MAGIC = b"SILOCKPT"
VERSION = 1
OWNER_TAG_SIZE = 16
_HEADER = struct.Struct("<8sHHIQQIIQQ16s")
"""magic, version, encoding, incompatible features, sequence, size, chunk size, block size, number of chunks,
length of the classes in bytes, whose checkpoint it is."""
_DIGEST_SIZE = 32


class Kept(enum.IntEnum):
    """What a checkpoint keeps of a chunk."""

    ABSENT_STORE = 0
    ABSENT_PEER = 1
    LOCAL = 2
    UNPUNCHED = 3


class _Encoding(enum.IntEnum):
    RUNS = 1
    """One little-endian 64-bit number per run of equal classes: ``length << 2 | class``."""
    PACKED = 2
    """Four chunks per byte, the first one in the lowest bits."""


_STATE_OF = np.array(
    [
        Residency.ABSENT_STORE,
        Residency.ABSENT_PEER | SYNC_DIRTY,
        Residency.PRESENT | SYNC_DIRTY,
        Residency.ZERO_UNPUNCHED | SYNC_DIRTY,
    ],
    dtype=np.uint8,
)
"""By class."""


@attrs.frozen(eq=False)
class Checkpoint:
    """A decoded checkpoint."""

    sequence: int
    geometry: Geometry
    kept: States
    """The class of every chunk."""


def owner_tag(group: str, volume: str) -> bytes:
    """What a file of a volume carries, so that another volume's file in its place is noticed."""
    return blake3(f"{group}/{volume}".encode()).digest(length=OWNER_TAG_SIZE)


def kept_of(states: Buffer) -> States:
    """The classes of chunks in these states. Raises `InvariantError` for a residency that does not exist."""
    residency = np.frombuffer(states, dtype=np.uint8) & np.uint8(RESIDENCY_MASK)
    if int(residency.max()) > Residency.PRESENT:
        raise InvariantError("the map of a volume holds a residency that does not exist")
    # The first four have the number of their class, and PRESENT (4) becomes LOCAL (2).
    kept: States = residency - (residency >> np.uint8(2) << np.uint8(1))
    return kept


def states_after_power_loss(kept: States) -> States:
    """The states in which chunks of these classes come back."""
    states: States = _STATE_OF[kept]
    return states


def encode_checkpoint(sequence: int, geometry: Geometry, owner: bytes, states: Buffer) -> bytes:
    """The bytes of the checkpoint of a map whose chunks are in ``states``."""
    if len(states) != geometry.chunk_count:
        raise InvariantError(f"a map of {len(states)} bytes was to be kept for {geometry.chunk_count} chunks")
    kept = kept_of(states)
    packed_size = (len(kept) + 3) // 4
    run_count = 1 + int(np.count_nonzero(kept[1:] != kept[:-1]))
    if run_count * 8 <= packed_size:
        encoding, classes = _Encoding.RUNS, _encode_runs(kept)
    else:
        encoding, classes = _Encoding.PACKED, _pack(kept)
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        encoding,
        0,
        sequence,
        geometry.size,
        geometry.chunk_size,
        geometry.block_size,
        geometry.chunk_count,
        len(classes),
        owner,
    )
    return b"".join((header, classes, blake3(header).update(classes).digest()))


def decode_checkpoint(data: Buffer, owner: bytes) -> Checkpoint:
    """The reverse of `encode_checkpoint`. Whatever the bytes are, they decode or raise `CorruptionError`."""
    if len(data) < _HEADER.size + _DIGEST_SIZE:
        raise CorruptionError(f"a checkpoint of {len(data)} bytes is too short")
    magic, version, encoding, features, sequence, *numbers, count, length, found_owner = _HEADER.unpack_from(
        data
    )
    if magic != MAGIC:
        raise CorruptionError("this is not a checkpoint")
    if version != VERSION or features:
        raise CorruptionError(
            f"a checkpoint of format {version} with features {features:#x} cannot be read",
            hint="it was written by a newer version of Silo, or it is damaged",
        )
    if len(data) != _HEADER.size + length + _DIGEST_SIZE:
        raise CorruptionError("the checkpoint has another length than it says")
    view = memoryview(data)
    if blake3(view[:-_DIGEST_SIZE]).digest() != bytes(view[-_DIGEST_SIZE:]):
        raise CorruptionError("the digest of the checkpoint does not match")
    if found_owner != owner:
        raise CorruptionError("the checkpoint belongs to another volume")
    try:
        geometry = Geometry(*numbers)
    except InvalidRequestError as error:
        raise CorruptionError(f"the checkpoint names an impossible geometry: {error}") from error
    if geometry.chunk_count != count:
        raise CorruptionError(f"the checkpoint names {count} chunks of {geometry.chunk_count}")
    classes = view[_HEADER.size : -_DIGEST_SIZE]
    if encoding == _Encoding.RUNS:
        return Checkpoint(sequence, geometry, _decode_runs(classes, count))
    if encoding == _Encoding.PACKED:
        return Checkpoint(sequence, geometry, _unpack(classes, count))
    raise CorruptionError(f"the checkpoint has the unknown encoding {encoding}")


def _encode_runs(kept: States) -> bytes:
    edges = np.concatenate(([0], np.flatnonzero(kept[1:] != kept[:-1]) + 1, [len(kept)])).astype(np.uint64)
    runs = np.diff(edges) << np.uint64(2) | kept[edges[:-1]]
    return runs.astype("<u8").tobytes()


def _decode_runs(classes: memoryview, count: int) -> States:
    if len(classes) % 8 or len(classes) > 8 * count:
        raise CorruptionError(f"{len(classes)} bytes cannot be the runs of a checkpoint")
    runs = np.frombuffer(classes, dtype="<u8")
    lengths = runs >> np.uint64(2)
    if len(runs) == 0 or int(lengths.min()) == 0 or int(lengths.max()) > count:
        raise CorruptionError("the checkpoint has an impossible run")
    # In two halves, because the sum of many hostile lengths may not fit 64 bits.
    total = (int((lengths >> np.uint64(19)).sum()) << 19) + int((lengths & np.uint64((1 << 19) - 1)).sum())
    if total != count:
        raise CorruptionError(f"the runs of the checkpoint cover {total} chunks instead of {count}")
    kept: States = np.repeat((runs & np.uint64(3)).astype(np.uint8), lengths.astype(np.int64))
    return kept


def _pack(kept: States) -> bytes:
    padded = np.zeros((len(kept) + 3) // 4 * 4, dtype=np.uint8)
    padded[: len(kept)] = kept
    first, second, third, fourth = padded.reshape(-1, 4).T
    return (first | second << 2 | third << 4 | fourth << 6).astype(np.uint8, copy=False).tobytes()


def _unpack(classes: memoryview, count: int) -> States:
    if len(classes) != (count + 3) // 4:
        raise CorruptionError(f"{len(classes)} bytes cannot be the classes of {count} chunks")
    fours = np.frombuffer(classes, dtype=np.uint8).astype("<u4")
    spread = (fours | fours << 6 | fours << 12 | fours << 18) & np.uint32(0x03030303)
    kept: States = spread.view(np.uint8)
    if kept[count:].any():
        raise CorruptionError("the checkpoint has classes beyond the last chunk")
    return kept[:count]
