"""What either side of a migration keeps on disk, and the body of the handover, which is nearly the same.

The *handover* is everything that the target must know to go on without the source's word: the terms of the claim,
which chunks it lacks the newest content of (``missing``), which ones no commit is known to cover (``unsynced``),
and the workload's state. It travels as one body in parts, and the target's record holds that very body, so what
was verified on arrival is what is read after a restart.

The *offer* is the source's record: which migration, to whom, on what terms, and how far it came.

All of it is msgpack with limits. Decoding raises `RemoteProtocolError` for a body from the wire and
`CorruptionError` for a record of our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from silo.chunkmap import Indices
from silo.errors import CapacityError, CorruptionError, RemoteProtocolError
from silo.geometry import Geometry
from silo.p2p.chunksets import SET_WINDOW, decode_window, encode_run, encode_set
from silo.p2p.handover import Mark
from silo.p2p.messages import VOLUMES_MAX, MigrationId, Name, SetData, VolumeOffer
from silo.p2p.terms import Terms

__all__ = [
    "HANDOVER_RECORD",
    "HANDOVER_SIZE_MAX",
    "OFFER_RECORD",
    "STATE_SIZE_MAX",
    "HandoverBody",
    "HandoverRecord",
    "OfferRecord",
    "PackedSet",
    "VolumeSets",
    "decode_handover",
    "decode_handover_record",
    "decode_offer_record",
    "encode_handover",
    "encode_record",
    "pack_all",
    "pack_set",
    "unpack_set",
]

OFFER_RECORD: Final = "offer"
HANDOVER_RECORD: Final = "handover"
"""Names of the records."""

STATE_SIZE_MAX: Final = 16 << 20
"""What `silo.Workload.capture` may return. A QEMU guest with its memory in a volume needs 0.3 MB."""
HANDOVER_SIZE_MAX: Final = STATE_SIZE_MAX + (48 << 20)
"""Two sets at one bit per chunk: room for 12 TiB in chunks of 64 KiB without any order in them."""

Record = TypeVar("Record", bound=msgspec.Struct)

PackedSet = tuple[tuple[int, SetData], ...]
"""``(window, data)`` as in `silo.p2p.chunksets`."""


class VolumeSets(msgspec.Struct, frozen=True, kw_only=True):
    """One volume's part of a handover. The geometry is repeated, so that a record can be read without the offer."""

    volume: VolumeOffer
    missing: Annotated[PackedSet, Meta(max_length=1 << 20)]
    """Changed since the base, and the newest content is not acknowledged."""
    unsynced: Annotated[PackedSet, Meta(max_length=1 << 20)]
    """Dirty at the source, or taken for a cut whose commit is not known. The target's first commit covers them."""


class HandoverBody(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, at the instant when no guest runs."""

    migration: MigrationId
    group: Name
    source_host: Name
    terms: Terms
    volumes: Annotated[tuple[VolumeSets, ...], Meta(min_length=1, max_length=VOLUMES_MAX)]
    state: Annotated[bytes, Meta(max_length=STATE_SIZE_MAX)]


class HandoverRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The target's record."""

    mark: Mark
    body: bytes
    """An encoded `HandoverBody`; empty once evacuated."""
    migration: MigrationId
    source_host: Name


class OfferRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The source's record."""

    mark: Mark
    migration: MigrationId
    group: Name
    target_url: str
    target_host: Name
    terms: Terms
    reclaim_nonce: str
    """Names our own claim, should we want the group back."""
    volumes: tuple[VolumeOffer, ...]
    """In the order of their numbers on the wire."""


_ENCODER: Final = msgspec.msgpack.Encoder()


def pack_set(chunks: Indices) -> PackedSet:
    """A set as it stands in a body."""
    return tuple(encode_set(chunks))


def pack_all(chunk_count: int) -> PackedSet:
    """Every chunk of a volume: one run per window."""
    return tuple(
        (first // SET_WINDOW, encode_run(0, min(SET_WINDOW, chunk_count - first)))
        for first in range(0, chunk_count, SET_WINDOW)
    )


def unpack_set(packed: PackedSet, geometry: Geometry) -> Iterator[Indices]:
    """The chunks, ascending, window by window. `RemoteProtocolError` unless they lie in the volume."""
    before = -1
    for window, data in packed:
        if window <= before:
            raise RemoteProtocolError("the windows of a chunk set are out of order")
        before = window
        yield decode_window(window, data, geometry.chunk_count)


def encode_handover(body: HandoverBody) -> bytes:
    """The bytes that travel. `CapacityError` when they are more than a target takes."""
    encoded = _ENCODER.encode(body)
    if len(body.state) > STATE_SIZE_MAX or len(encoded) > HANDOVER_SIZE_MAX:
        raise CapacityError(
            f"the handover would have {len(encoded)} bytes, {len(body.state)} of them the workload's state",
            hint=f"state may have {STATE_SIZE_MAX} bytes; keep the rest in a volume, or use larger chunks",
        )
    return encoded


def decode_handover(encoded: bytes) -> HandoverBody:
    """From the wire. `RemoteProtocolError` for anything that is no handover."""
    try:
        body = msgspec.msgpack.decode(encoded, type=HandoverBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"the handover holds nonsense: {error}") from error
    for part in body.volumes:
        geometry = part.volume.geometry()
        for packed in (part.missing, part.unsynced):
            for _ in unpack_set(packed, geometry):
                pass  # each window was looked at
    return body


def encode_record(record: OfferRecord | HandoverRecord) -> bytes:
    """The content of a record."""
    return _ENCODER.encode(record)


def decode_offer_record(content: bytes) -> OfferRecord:
    """Our own record. `CorruptionError` when it cannot be read."""
    return _decode(content, OfferRecord)


def decode_handover_record(content: bytes) -> HandoverRecord:
    """Our own record. `CorruptionError` when it cannot be read."""
    return _decode(content, HandoverRecord)


def _decode(content: bytes, kind: type[Record]) -> Record:
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptionError(
            f"the {kind.__name__} cannot be read: {error}", hint="was it written by a newer version?"
        ) from error
