"""The head: the one object of a group that ever changes, and what it says.

Its bytes are JSON in an envelope whose digest covers exactly the bytes of the inner object::

    {"blake3":"<64 hexadecimal digits>","head":{...}}

so that damage is noticed in the one place that nothing else vouches for. From here a digest tree reaches every
byte of the group: head → index of each segment since the root → chunks, and head → root → page → chunks.

`Head` is a value. Who may replace one by another is decided by the register (`silo.sync.register`); what it means
for the map, by `silo.sync.manifest`. Everything here is pure; the parser takes untrusted bytes and raises
`CorruptionError`, nothing else.
"""

from __future__ import annotations

import enum
import re

import msgspec

from silo.abc import Buffer
from silo.errors import CorruptionError, InvalidRequestError
from silo.geometry import Geometry
from silo.names import check_group_name, check_volume_name
from silo.sync.codec import digest_of
from silo.sync.layout import (
    EPOCH_MAX,
    FEATURE_ENCRYPTED,
    GENERATION_MAX,
    PREAMBLE_SIZE,
    SEQ_MAX,
    check_readable,
    is_incarnation,
    parse_pin_key,
    parse_segment_key,
)
from silo.sync.lease import LEASE_MAX_S
from silo.sync.segment import FOOTER_SIZE, VOLUMES_MAX

__all__ = [
    "HEAD_SIZE_MAX",
    "ClaimRecord",
    "Head",
    "Intent",
    "Keeping",
    "Kept",
    "PartRef",
    "RootRef",
    "SegmentRef",
    "VolumeInfo",
    "WriterState",
    "encode_head",
    "parse_head",
    "parse_record",
]

LABEL_LENGTH_MAX = 200

HEAD_SIZE_MAX = 64 * 1024 * 1024
"""More than the list of segments of a first cut of many TiB needs; a bound for what is read into memory."""

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_BEFORE = b'{"blake3":"'
_BETWEEN = b'","head":'
_INNER = len(_BEFORE) + 64 + len(_BETWEEN)


class WriterState(enum.Enum):
    """What the owner named in the head is doing."""

    OPEN = "open"
    """It may be serving a guest. Taking the group from it needs its consent, or the assertion that it is dead."""
    RELEASED = "released"
    """It stored everything and closed. Anybody may open the group."""


class VolumeInfo(msgspec.Struct, frozen=True):
    """A volume of the group."""

    name: str
    size: int
    chunk_size: int
    block_size: int

    @property
    def geometry(self) -> Geometry:
        """As a value with arithmetic."""
        return Geometry(self.size, self.chunk_size, self.block_size)


class SegmentRef(msgspec.Struct, frozen=True):
    """A segment since the root, with what is needed to read and verify its index."""

    key: str
    size: int
    index_offset: int
    index_length: int
    index_digest: str


class PartRef(msgspec.Struct, frozen=True):
    """A part of an object, with its digest."""

    key: str
    offset: int
    length: int
    digest: str


class RootRef(msgspec.Struct, frozen=True):
    """The root of the paged map: itself (``inline``, in base64) when it is small, else where it is (``stored``)."""

    inline: bytes | None = None
    stored: PartRef | None = None


class Keeping(enum.Enum):
    """Why a copy of a head is kept."""

    POINT = "point"
    """Somebody may want this generation back."""
    FORK = "fork"
    """Another group refers to what this generation refers to."""
    READER = "reader"
    """Somebody reads this generation just now."""


class Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """What makes a copy of a head a record: why it is kept. See `silo.sync.pins`."""

    why: Keeping
    created: float
    """POSIX seconds by the clock of whoever made the record."""
    label: str = ""
    holder: str = ""
    """The group that a fork is."""


class ClaimRecord(msgspec.Struct, frozen=True):
    """How the present epoch came about. Kept by every later commit of that epoch."""

    nonce: str
    """Names the attempt: a source that finds the nonce of its offer here knows that the target has won."""
    previous_epoch: int
    previous_generation: int
    forced: bool = False
    """The previous owner was asserted to be dead."""


class Intent(msgspec.Struct, frozen=True):
    """A claimant's announcement, put into a head that is otherwise the owner's. See `silo.sync.lease`."""

    incarnation: str
    """Of the claimant."""
    over: str
    """The nonce of the owner's head."""


class Head(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything that is known about the newest committed generation of a group."""

    version: int = msgspec.field(name="format")
    incompat: int
    group: str
    epoch: int
    incarnation: str
    nonce: str
    """Fresh in every body, so that no two bodies, and no two ETags, are ever equal."""
    generation: int
    """0 until the first commit: nothing is stored, and every volume reads as zeros."""
    seq: int
    """The highest sequence number of this epoch that this head, or an earlier one, refers to."""
    cut_time: float
    """POSIX seconds of the instant that this generation shows, by the writer's clock."""
    state: WriterState
    volumes: tuple[VolumeInfo, ...]
    segments: tuple[SegmentRef, ...]
    """Since the root, in the order in which they apply."""
    root: RootRef | None = None
    gc_floor: int = 0
    """Generations below it may have lost their segments, unless a record keeps them."""
    claim: ClaimRecord | None = None
    lease_s: float | None = None
    """The owner serves no longer than this after it last saw its epoch here; ``None``: until it finds another one."""
    intent: Intent | None = None
    """Somebody waits for the lease to end."""
    hot: PartRef | None = None
    """The chunks that are read first after a start."""
    resume: PartRef | None = None
    """The saved state of the workload, which fits this generation and no other (safety rule 14). With it a group that
    is released is *hibernated*: any host may resume it. The next generation is without."""
    parents: tuple[str, ...] = ()
    """Keys of the pins in other groups that keep what this group refers to there."""
    keys: tuple[int, ...] = ()
    """Ids of the master keys that something of this group was encrypted with; none: it is not encrypted."""
    kept: Kept | None = None
    """Only in records, never in the register."""

    @property
    def owners_nonce(self) -> str:
        """The nonce of the owner's own body, below whatever intent."""
        return self.intent.over if self.intent else self.nonce

    @property
    def is_hibernated(self) -> bool:
        """Released, with the state of its workload."""
        return self.state is WriterState.RELEASED and self.resume is not None

    def volume(self, name: str) -> VolumeInfo | None:
        """The volume of this name."""
        return next((volume for volume in self.volumes if volume.name == name), None)


def encode_head(head: Head) -> bytes:
    """The bytes of the object."""
    inner = msgspec.json.encode(head)
    return b"".join((_BEFORE, digest_of(inner).hex().encode(), _BETWEEN, inner, b"}"))


_decoder = msgspec.json.Decoder(Head)


def parse_head(data: Buffer, group: str) -> Head:
    """The head of ``group``, every field checked."""
    body = bytes(data)
    inner = body[_INNER:-1]
    digest = body[len(_BEFORE) : len(_BEFORE) + 64]
    framed = body.startswith(_BEFORE) and body[len(_BEFORE) + 64 : _INNER] == _BETWEEN and body.endswith(b"}")
    if not framed or digest != digest_of(inner).hex().encode():
        raise CorruptionError("the head does not have its digest")
    try:
        head = _decoder.decode(inner)
    except (msgspec.MsgspecError, RecursionError) as error:
        _refuse_newer(inner)
        raise CorruptionError(f"the head cannot be read: {error}") from None
    check_readable("head", head.version, head.incompat)
    try:
        _check(head, group)
    except InvalidRequestError as error:
        raise CorruptionError(f"the head names what cannot exist: {error.message}") from None
    return head


def parse_record(data: Buffer, group: str) -> Head:
    """A record of ``group``: a copy of its head with a reason why it is kept."""
    record = parse_head(data, group)
    if record.kept is None:
        raise CorruptionError(f"a record of group {group} does not say why it is kept")
    return record


class _Versions(msgspec.Struct):
    version: int = msgspec.field(name="format")
    incompat: int


def _refuse_newer(inner: bytes) -> None:
    """A newer format may have fields of other types: say that rather than which field it was."""
    try:
        versions = msgspec.json.decode(inner, type=_Versions)
    except (msgspec.MsgspecError, RecursionError):
        return
    check_readable("head", versions.version, versions.incompat)


def _check(head: Head, group: str) -> None:
    check_group_name(head.group)
    _require(head.group == group, f"it belongs to group {head.group!r}")
    _require(0 < head.epoch <= EPOCH_MAX, "epoch")
    _require(0 <= head.generation <= GENERATION_MAX and 0 <= head.gc_floor <= GENERATION_MAX, "generation")
    _require(0 <= head.seq <= SEQ_MAX, "seq")
    _require(is_incarnation(head.incarnation) and 0 < len(head.nonce) <= 64, "incarnation or nonce")
    _require(head.lease_s is None or 0 < head.lease_s <= LEASE_MAX_S, "lease")
    if head.intent is not None:
        _require(is_incarnation(head.intent.incarnation) and 0 < len(head.intent.over) <= 64, "intent")
    _require(bool(head.keys) == bool(head.incompat & FEATURE_ENCRYPTED), "keys")
    _require(all(0 < key < 1 << 32 for key in head.keys), "keys")
    _require(0 < len(head.volumes) < VOLUMES_MAX, "number of volumes")
    _require(len({volume.name for volume in head.volumes}) == len(head.volumes), "a volume is named twice")
    for volume in head.volumes:
        check_volume_name(volume.name)
        _require(volume.geometry.size > 0, "size")
    for segment in head.segments:
        parse_segment_key(segment.key)
        _require(segment.index_offset >= PREAMBLE_SIZE and segment.index_length > 0, "index")
        _require(
            segment.index_offset + segment.index_length + FOOTER_SIZE == segment.size, "size of a segment"
        )
        _check_digest(segment.index_digest)
    if head.root is not None:
        _require((head.root.inline is None) != (head.root.stored is None), "root")
        if head.root.stored is not None:
            _check_part(head.root.stored)
    if head.hot is not None:
        _check_part(head.hot)
    if head.resume is not None:
        _check_part(head.resume)
    for parent in head.parents:
        parse_pin_key(parent)
    if head.kept is not None:
        label = head.kept.label
        _require(len(label) <= LABEL_LENGTH_MAX and (not label or label.isprintable()), "label")
        if head.kept.holder:
            check_group_name(head.kept.holder)


def _check_part(part: PartRef) -> None:
    parse_segment_key(part.key)
    _require(part.offset >= PREAMBLE_SIZE and 0 < part.length <= HEAD_SIZE_MAX, "part of an object")
    _check_digest(part.digest)


def _check_digest(digest: str) -> None:
    _require(_DIGEST.match(digest) is not None, "digest")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise CorruptionError(f"the head does not make sense: {what}")
