"""Where things are in a store: the keys of a group, and the few bytes that all binary formats begin with.

::

    <group>/head                                            the register, changed only by compare-and-swap
    <group>/segments/<shard>/<epoch>-<seq>-<incarnation>    immutable: chunks, or pages of the map
    <group>/points/<generation>                             records of kept restore points
    <group>/pins/<token>                                    records of who else needs a generation
    <group>/proofs/<token>                                  short-lived: two hosts prove that they see one store

A segment key is never used twice: ``epoch`` belongs to one writer, ``incarnation`` is drawn at random when
that writer opens the group, ``seq`` counts within it. So an upload of a writer that has been fenced can
neither replace nor be mistaken for anything. The shard spreads keys over the partitions of a store; readers
take keys as they are written in ``head`` and never compute them.

Every key in a head, a root or a page is complete and names the owning group, so that one group may refer to
what another one stored.

Everything here is pure. The formats are specified in ``docs/formats/store.md``.
"""

from __future__ import annotations

import re
import struct

import attrs
from blake3 import blake3

from silo.abc import Buffer
from silo.errors import CorruptionError, InvalidRequestError
from silo.names import check_group_name

__all__ = [
    "EPOCH_MAX",
    "FEATURE_ENCRYPTED",
    "FORMAT_VERSION",
    "GENERATION_MAX",
    "PREAMBLE_SIZE",
    "SEQ_MAX",
    "Magic",
    "SegmentName",
    "check_readable",
    "head_key",
    "is_incarnation",
    "pack_preamble",
    "parse_pin_key",
    "parse_preamble",
    "parse_segment_key",
    "pin_key",
    "pins_prefix",
    "point_key",
    "points_prefix",
    "proof_key",
    "segments_prefix",
]

FORMAT_VERSION = 1

FEATURE_ENCRYPTED = 1
"""What is in an object, or in all objects of a group, is in envelopes (`silo.sync.cipher`)."""
FEATURES = FEATURE_ENCRYPTED
"""All incompatible features that this code knows."""

EPOCH_MAX = 10**10 - 1
"""Ten digits: one claim per second for three centuries."""
SEQ_MAX = 10**12 - 1
GENERATION_MAX = 10**12 - 1

_HEX16 = re.compile(r"[0-9a-f]{16}\Z")
_HEX32 = re.compile(r"[0-9a-f]{32}\Z")
_PIN_KEY = re.compile(r"(?P<group>[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127})/pins/(?P<token>[0-9a-f]{32})\Z")
_SEGMENT_KEY = re.compile(
    r"(?P<group>[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127})/segments/(?P<shard>[0-9a-f]{2})/"
    r"(?P<epoch>[0-9]{10})-(?P<seq>[0-9]{12})-(?P<incarnation>[0-9a-f]{16})\Z"
)


def is_incarnation(text: str) -> bool:
    """Whether ``text`` has the form of an incarnation: 16 hexadecimal digits in lower case."""
    return _HEX16.match(text) is not None


def head_key(group: str) -> str:
    """The key of the register."""
    check_group_name(group)
    return f"{group}/head"


def segments_prefix(group: str) -> str:
    """What the keys of all segments of a group begin with."""
    check_group_name(group)
    return f"{group}/segments/"


def point_key(group: str, generation: int) -> str:
    """The key of the record of a kept restore point."""
    check_group_name(group)
    if not 0 <= generation <= GENERATION_MAX:
        raise InvalidRequestError(f"generation {generation} is out of range")
    return f"{group}/points/{generation:012d}"


def points_prefix(group: str) -> str:
    """What the keys of all kept restore points of a group begin with."""
    check_group_name(group)
    return f"{group}/points/"


def pin_key(group: str, token: str) -> str:
    """The key of a pin in ``group``; ``token`` has 32 hexadecimal digits."""
    check_group_name(group)
    if _HEX32.match(token) is None:
        raise InvalidRequestError("the token of a pin is not 32 hexadecimal digits")
    return f"{group}/pins/{token}"


def pins_prefix(group: str) -> str:
    """What the keys of all pins in a group begin with."""
    check_group_name(group)
    return f"{group}/pins/"


def parse_pin_key(key: str) -> tuple[str, str]:
    """``(group, token)`` of the key of a pin. Raises `CorruptionError` when it is not one."""
    match = _PIN_KEY.match(key)
    if match is None:
        raise CorruptionError(f"{key[:120]!r} is not the key of a pin")
    return match["group"], match["token"]


def proof_key(group: str, token: str) -> str:
    """Where a host writes ``token`` (32 hexadecimal digits) so that another one can read it back."""
    check_group_name(group)
    if _HEX32.match(token) is None:
        raise InvalidRequestError("the token of a proof is not 32 hexadecimal digits")
    return f"{group}/proofs/{token}"


@attrs.frozen
class SegmentName:
    """What the key of a segment says."""

    group: str
    epoch: int
    seq: int
    incarnation: str

    def __attrs_post_init__(self) -> None:
        check_group_name(self.group)
        if not (0 < self.epoch <= EPOCH_MAX and 0 < self.seq <= SEQ_MAX and is_incarnation(self.incarnation)):
            raise InvalidRequestError(f"segment {self.epoch}-{self.seq}-{self.incarnation} is out of range")

    @property
    def key(self) -> str:
        """The complete key. Keys of one shard sort by epoch, then by sequence number."""
        name = f"{self.epoch:010d}-{self.seq:012d}-{self.incarnation}"
        return f"{self.group}/segments/{blake3(name.encode()).hexdigest(1)}/{name}"


def parse_segment_key(key: str) -> SegmentName:
    """The name behind a key. Raises `CorruptionError` when it is not the key of a segment."""
    match = _SEGMENT_KEY.match(key)
    if match is not None and int(match["epoch"]) and int(match["seq"]):
        name = SegmentName(match["group"], int(match["epoch"]), int(match["seq"]), match["incarnation"])
        if name.key == key:
            return name
    raise CorruptionError(f"{key[:120]!r} is not the key of a segment")


class Magic:
    """The first eight bytes of every binary object and part."""

    SEGMENT = b"SILOSEG\n"
    FOOTER = b"SILOEND\n"
    PAGES = b"SILOMAP\n"
    PAGE = b"SILOPAG\n"
    ROOT = b"SILOROT\n"
    HOT = b"SILOHOT\n"
    STATE = b"SILOSTA\n"


_PREAMBLE = struct.Struct("<8sHHI")
PREAMBLE_SIZE = _PREAMBLE.size
"""16 bytes: magic, format version, two bytes of zero, incompatible-feature bits."""


def pack_preamble(magic: bytes, features: int = 0) -> bytes:
    """The beginning of a binary object or part that uses these incompatible features."""
    return _PREAMBLE.pack(magic, FORMAT_VERSION, 0, features)


def parse_preamble(data: Buffer, magic: bytes) -> int:
    """The features of ``data``, which must begin as a part with this magic that we can read; else `CorruptionError`."""
    what = magic.decode("ascii").strip()
    if len(data) < PREAMBLE_SIZE:
        raise CorruptionError(f"{what}: {len(data)} bytes are too few")
    found, version, reserved, features = _PREAMBLE.unpack_from(data)
    if found != magic or reserved:
        raise CorruptionError(f"{what}: it begins with other bytes")
    check_readable(what, version, features)
    return int(features)


def check_readable(what: str, version: int, features: int) -> None:
    """Raise `CorruptionError` for a format version or an incompatible feature that this code does not know."""
    if version != FORMAT_VERSION or features & ~FEATURES:
        raise CorruptionError(
            f"{what}: format {version} with feature bits {features:#x} cannot be read",
            hint="it was written by a newer version of Silo, or it is damaged",
        )
