"""The control messages of the peer protocol: one msgpack map per frame, one struct per frame type.

Unknown fields are ignored, so that a newer host may say more; whatever an older host must not miss needs a
feature bit or a new version. Every string and every list has a limit. Nothing here names a path, a URL or a
credential: where the target keeps a volume and its store is the target's own business (safety rule 7).

`decode` is for hostile bytes and raises only `RemoteProtocolError`.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from silo.chunkmap import Indices
from silo.errors import InvalidRequestError, RemoteProtocolError
from silo.geometry import Geometry
from silo.p2p.chunksets import decode_window, encode_set
from silo.p2p.wire import DIGEST_SIZE, MIGRATION_ID_SIZE, Frame, FrameType, frame_header

__all__ = [
    "DEALT_MAX",
    "FEATURES",
    "FEATURE_ZSTD",
    "FINAL_ROUND",
    "HEAT_WINDOW",
    "PROTOCOL_VERSIONS",
    "TEXT_MAX",
    "VOLUMES_MAX",
    "Accept",
    "Ack",
    "AtWork",
    "Declined",
    "Drained",
    "Evacuated",
    "Handover",
    "Heat",
    "Hello",
    "Invalidate",
    "Lane",
    "Message",
    "Need",
    "NeedEnd",
    "Offer",
    "Reason",
    "Refused",
    "Released",
    "Round",
    "Stage",
    "Taken",
    "Unavailable",
    "VolumeOffer",
    "Want",
    "Welcome",
    "Withdraw",
    "Zeros",
    "decode",
    "encode",
    "frame_type",
    "message_set",
    "set_messages",
]

PROTOCOL_VERSIONS: Final = (1, 1)
"""Oldest and newest version of the peer protocol that this program speaks."""
FEATURE_ZSTD: Final = 1
"""Bit of ``features``: chunks may travel compressed."""
FEATURES: Final = FEATURE_ZSTD
"""What this program knows. Each side says its own; what both have said may be used."""
VOLUMES_MAX: Final = 256
HEAT_WINDOW: Final = 1 << 16
"""Chunks whose heat one message carries."""
DEALT_MAX: Final = 64
FINAL_ROUND: Final = (1 << 32) - 1
"""The round of everything that is sent after the handover: the content does not change any more."""

Name = Annotated[str, Meta(min_length=1, max_length=255)]
TEXT_MAX: Final = 2000
Text = Annotated[str, Meta(max_length=TEXT_MAX)]
U16 = Annotated[int, Meta(ge=0, lt=1 << 16)]
U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
MigrationId = Annotated[bytes, Meta(min_length=MIGRATION_ID_SIZE, max_length=MIGRATION_ID_SIZE)]
Digest = Annotated[bytes, Meta(min_length=DIGEST_SIZE, max_length=DIGEST_SIZE)]
Proof = Annotated[str, Meta(max_length=64)]
SetData = Annotated[bytes, Meta(min_length=2, max_length=(1 << 17) + 1)]


class Lane(enum.Enum):
    """What a connection is for."""

    BULK = "bulk"
    """Control, and chunks that are pushed."""
    DEMAND = "demand"
    """Chunks that a guest waits for. Its own connection, so that it never queues behind pushes."""
    PUSH = "push"
    """More chunks that are pushed: one TCP connection does not fill every network. Any number of them."""


class Stage(enum.Enum):
    """How far a migration has come, as either side knows it."""

    NEW = "new"
    COPYING = "copying"
    HANDED = "handed"
    """The source has sent HANDOVER; the target has it on disk."""


class Reason(enum.Enum):
    """Why a connection was refused."""

    VERSION = "version"
    UNKNOWN = "unknown"
    """The target knows nothing of this migration: it holds neither record nor claim."""
    GONE = "gone"
    """The target has discarded this migration, and will never claim for it."""
    BUSY = "busy"
    DENIED = "denied"


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Source: the first frame of every connection."""

    oldest: U16
    newest: U16
    features: U63 = 0
    host: Name
    group: Name
    migration: MigrationId
    link: U32
    """Counts the source's attempts to connect; all connections of one link carry the same number."""
    connection: U32 = 0
    """Counts the source's connections: no two of a migration carry the same number."""
    lane: Lane
    stage: Stage


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """Target: the answer to HELLO."""

    version: U16
    features: U63 = 0
    host: Name
    stage: Stage
    window: U63
    """Bytes of pushes that the source may have unacknowledged."""
    dealt: Annotated[dict[U32, U63], Meta(max_length=DEALT_MAX)] = {}
    """By earlier connection: how many of its pushes were dealt with, acknowledged or not. They need not come again."""


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Target: the answer to HELLO or OFFER that ends the connection. Both sides' numbers are in the text."""

    reason: Reason
    host: Name
    message: Text
    """For people."""


class VolumeOffer(msgspec.Struct, frozen=True, kw_only=True):
    """One volume of the group that is about to move."""

    name: Name
    size: U63
    chunk_size: U63
    block_size: U63
    used: U63
    """Bytes in chunks that are not known to be zero."""

    def geometry(self) -> Geometry:
        """The geometry. `RemoteProtocolError` when there is no such thing."""
        try:
            return Geometry(self.size, self.chunk_size, self.block_size)
        except InvalidRequestError as error:
            raise RemoteProtocolError(
                f"volume {self.name!r} is offered with a geometry of no use: {error}"
            ) from error


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """Source: what would move. Answered by ACCEPT or REFUSED, when the target's owner has decided."""

    volumes: Annotated[list[VolumeOffer], Meta(min_length=1, max_length=VOLUMES_MAX)]
    generation: U63 | None
    """The oldest generation that the target may start from; ``None`` when the source has no store."""
    proof: Proof = ""
    """What the source has written to its store; the target must find it in its own (safety rule 7)."""


class Accept(msgspec.Struct, frozen=True, kw_only=True):
    """Target: send. It sees the same register, and has everything that it needs."""


class Heat(msgspec.Struct, frozen=True, kw_only=True):
    """Source: how hot chunks are, from ``first`` on, one byte each: 0, or 16 * log2(1 + count) rounded, at most 255."""

    volume: U16
    first: U63
    reads: Annotated[bytes, Meta(max_length=HEAT_WINDOW)]
    writes: Annotated[bytes, Meta(max_length=HEAT_WINDOW)]


class Invalidate(msgspec.Struct, frozen=True, kw_only=True):
    """Source: from this round on these chunks have newer content than the target got before."""

    round: U32
    volume: U16
    window: U32
    chunks: SetData


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Source: every INVALIDATE of this round has been said. What is pushed as of it, on any connection, counts now."""

    round: U32


class Zeros(msgspec.Struct, frozen=True, kw_only=True):
    """Source: these chunks read as zeros, as of this round. The push of chunks that need no bytes."""

    round: U32
    volume: U16
    window: U32
    chunks: SetData


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """Target: so many pushes (CHUNK and ZEROS) of this connection have been dealt with, since its start."""

    pushes: U63


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """Source: the guest is suspended, and this is everything. The body came before, in PART frames."""

    length: U63
    digest: Digest


class AtWork(msgspec.Struct, frozen=True, kw_only=True):
    """Target: it deals with the handover and is not done. Repeated, so that a slow store or a slow workload is not
    taken for a host that died."""

    claimed: bool
    """The claim is won; what takes time is the workload."""


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """Target: the claim is won, and the workload runs. Repeated on every connection until evacuated."""

    epoch: U63
    workload_s: Seconds
    """Of the time since HANDOVER, what the workload's own hooks took."""


class Declined(msgspec.Struct, frozen=True, kw_only=True):
    """Target: it has not claimed and never will; everything durable about this migration is gone."""

    message: Text


class Withdraw(msgspec.Struct, frozen=True, kw_only=True):
    """Source: it wants the group back. A target that has not made the handover durable discards it."""

    message: Text


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """Target, on a connection after the first: chunks that it still lacks and that only the source has."""

    volume: U16
    window: U32
    chunks: SetData


class NeedEnd(msgspec.Struct, frozen=True, kw_only=True):
    """Target: NEED is complete; what it did not name need not be sent."""


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """Source: everything that it meant to push has been sent. The target answers EVACUATED, in time, or NEED."""


class Evacuated(msgspec.Struct, frozen=True, kw_only=True):
    """Target: every chunk that only the source had is durable here, and so is that fact (safety rule 13)."""

    bytes_store: U63 = 0


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """Source: it knows, durably. The answer to every EVACUATED."""


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """Target, demand lane: a guest waits for this chunk."""

    volume: U16
    chunk: U63


class Unavailable(msgspec.Struct, frozen=True, kw_only=True):
    """Source, demand lane: the chunk cannot be read here."""

    volume: U16
    chunk: U63
    message: Text


Message = (
    Hello | Welcome | Refused | Offer | Accept | Heat | Invalidate | Round | Zeros | Ack | Handover | AtWork | Taken
    | Declined | Withdraw | Need | NeedEnd | Drained | Evacuated | Released | Want | Unavailable
)  # fmt: skip

_TYPES: Final[dict[type[msgspec.Struct], FrameType]] = {
    Hello: FrameType.HELLO,
    Welcome: FrameType.WELCOME,
    Refused: FrameType.REFUSED,
    Offer: FrameType.OFFER,
    Accept: FrameType.ACCEPT,
    Heat: FrameType.HEAT,
    Invalidate: FrameType.INVALIDATE,
    Round: FrameType.ROUND,
    Zeros: FrameType.ZEROS,
    Ack: FrameType.ACK,
    Handover: FrameType.HANDOVER,
    AtWork: FrameType.AT_WORK,
    Taken: FrameType.TAKEN,
    Declined: FrameType.DECLINED,
    Withdraw: FrameType.WITHDRAW,
    Need: FrameType.NEED,
    NeedEnd: FrameType.NEED_END,
    Drained: FrameType.DRAINED,
    Evacuated: FrameType.EVACUATED,
    Released: FrameType.RELEASED,
    Want: FrameType.WANT,
    Unavailable: FrameType.UNAVAILABLE,
}
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODERS: Final[dict[FrameType, msgspec.msgpack.Decoder[Any]]] = {
    type_: msgspec.msgpack.Decoder(struct) for struct, type_ in _TYPES.items()
}

SetMessage = TypeVar("SetMessage", Invalidate, Zeros)


def encode(message: Message) -> bytes:
    """A whole frame. `LocalProtocolError` when the message exceeds the limit of its type."""
    body = _ENCODER.encode(message)
    return frame_header(_TYPES[type(message)], len(body)) + body


def frame_type(message: Message) -> FrameType:
    """Which frame carries the message."""
    return _TYPES[type(message)]


def decode(frame: Frame) -> Message:
    """The message of a control frame. `RemoteProtocolError` when it is not what its type promises."""
    decoder = _DECODERS.get(frame.type)
    if decoder is None:
        raise RemoteProtocolError(f"a {frame.type.name} frame is no control message")
    try:
        message: Message = decoder.decode(frame.payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"a {frame.type.name} frame holds nonsense: {error}") from error
    return message


def set_messages(kind: type[SetMessage], round_: int, volume: int, chunks: Indices) -> list[SetMessage]:
    """INVALIDATE or ZEROS for an ascending set of chunks, one message per window that is not empty."""
    return [kind(round=round_, volume=volume, window=w, chunks=data) for w, data in encode_set(chunks)]


def message_set(message: Invalidate | Zeros | Need, chunk_count: int) -> Indices:
    """The chunks that a message names; `RemoteProtocolError` unless the volume has them all."""
    return decode_window(message.window, message.chunks, chunk_count)
