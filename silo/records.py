"""What a host knows about itself and its groups, as small files: the identity of a group, offers, handovers.

A record is one line of text and then its content, whatever that is::

    silo-record 1 <name> <length> <BLAKE3 of the content>\\n

The line can be read by people, and it makes a record that was torn, damaged or put under another name a
`CorruptionError`. Nothing is ever taken from such a record.

The content of an identity is JSON; that of every other record is known only to whoever wrote it. This module
only translates; `silo.statedir` reads and writes.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec
from blake3 import blake3

from silo.abc import Buffer
from silo.errors import CorruptionError, InvalidRequestError
from silo.geometry import Geometry

__all__ = [
    "Attempt",
    "Identity",
    "VolumeGeometry",
    "check_record_name",
    "decode_identity",
    "decode_record",
    "encode_identity",
    "encode_record",
]

IDENTITY_FORMAT = 1

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}\Z")
_LINE = re.compile(rb"silo-record (\d{1,9}) ([a-z][a-z0-9_-]{0,63}) (\d{1,19}) ([0-9a-f]{64})\n")
_LINE_MAX = 256


class VolumeGeometry(msgspec.Struct, frozen=True):
    """A volume of the group."""

    name: str
    size: int
    chunk_size: int
    block_size: int

    @property
    def geometry(self) -> Geometry:
        """As a value with arithmetic."""
        return Geometry(self.size, self.chunk_size, self.block_size)


class Attempt(msgspec.Struct, frozen=True):
    """A claim that was begun."""

    epoch: int
    incarnation: str


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Which incarnation of which group lives in a state directory."""

    group: str
    epoch: int
    incarnation: str
    """Drawn at random by each writable open; part of the keys of everything that it stores."""
    register: str = ""
    """The URL of the store, without credentials; empty when there is none."""
    generation: int = 0
    """The newest one of this epoch that was known to be committed when this was written."""
    claims: tuple[Attempt, ...] = ()
    """Claims begun since, one of which may have taken effect: all of these owners are this host."""
    volumes: tuple[VolumeGeometry, ...] = ()
    owner: str = ""
    """This host's side of the ownership, in the words of the handover's tables."""
    version: int = msgspec.field(default=IDENTITY_FORMAT, name="format")


def check_record_name(name: str) -> None:
    """Raise `InvalidRequestError` unless ``name`` may name a record."""
    if _NAME.match(name) is None:
        raise InvalidRequestError(
            f"{name[:80]!r} cannot name a record", hint="lower case letters, digits, '_' and '-'"
        )


def encode_record(name: str, content: Buffer) -> bytes:
    """The bytes of a record."""
    check_record_name(name)
    line = f"silo-record 1 {name} {len(content)} {blake3(content).hexdigest()}\n"
    return b"".join((line.encode("ascii"), content))


def decode_record(name: str, data: bytes) -> bytes:
    """The content of a record. Whatever the bytes are, they decode or raise `CorruptionError`."""
    match = _LINE.match(data[:_LINE_MAX])
    if match is None:
        raise CorruptionError(f"the record {name} does not begin as a record does")
    version, found_name, length, digest = match.groups()
    if int(version) != 1:
        raise CorruptionError(
            f"the record {name} has format {int(version)}, which cannot be read",
            hint="it was written by a newer version of Silo",
        )
    if found_name.decode("ascii") != name:
        raise CorruptionError(f"the record {name} was written as {found_name.decode('ascii')}")
    content = data[match.end() :]
    if len(content) != int(length):
        raise CorruptionError(f"the record {name} has {len(content)} bytes of {int(length)}")
    if blake3(content).hexdigest().encode("ascii") != digest:
        raise CorruptionError(f"the digest of the record {name} does not match")
    return content


def encode_identity(identity: Identity) -> bytes:
    """The content of the identity's record. Refuses a register with anything in it that could be a secret."""
    parts = urlsplit(identity.register)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidRequestError(
            "the URL of the register carries more than a place",
            hint="credentials belong into the environment or the configuration of the store",
        )
    return msgspec.json.format(msgspec.json.encode(identity), indent=2)


def decode_identity(group: str, content: bytes) -> Identity:
    """The reverse. Whatever the bytes are, they decode, as the identity of ``group``, or raise `CorruptionError`."""
    try:
        identity = msgspec.json.decode(content, type=Identity)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptionError(f"the identity of {group} makes no sense: {error}") from error
    if identity.version != IDENTITY_FORMAT:
        raise CorruptionError(
            f"the identity of {group} has format {identity.version}, which cannot be read",
            hint="it was written by a newer version of Silo",
        )
    if identity.group != group:
        raise CorruptionError(f"the identity of {group} is that of {identity.group[:80]}")
    return identity
