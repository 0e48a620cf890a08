"""The state of a stopped workload, as an object in the store that the head names with its digest.

::

    preamble │ length of the state, 8 bytes │ state

It lies under a key of the same kind as segments, so that it is never replaced, and what a fenced writer left is garbage
like any other. What makes it valid is the head alone: it is named by the very commit that releases the group, which
nothing but a claim can follow (safety rule 14).
"""

from __future__ import annotations

import struct

from silo.abc import STATE_SIZE_MAX
from silo.errors import CapacityError, CorruptionError
from silo.sync.cipher import OVERHEAD, KeyRing, check_keys
from silo.sync.claim import Owner
from silo.sync.codec import digest_of
from silo.sync.head import Head, PartRef
from silo.sync.layout import FEATURE_ENCRYPTED, PREAMBLE_SIZE, Magic, pack_preamble, parse_preamble
from silo.sync.reader import StoreReader
from silo.sync.sender import ObjectSender

__all__ = ["read_state", "write_state"]

_LENGTH = struct.Struct("<Q")


async def write_state(
    sender: ObjectSender, owner: Owner, state: bytes, keys: KeyRing | None = None
) -> PartRef:
    """Store the state, encrypted with ``keys``, and say where it is. Waits as long as the store does not answer: the
    caller has a deadline.

    Cancelled, it leaves an object to which nothing refers. `CapacityError` when the state is too large.
    """
    if len(state) > STATE_SIZE_MAX:
        raise CapacityError(
            f"the state of a workload has {len(state)} bytes, at most {STATE_SIZE_MAX} are kept"
        )
    body = _LENGTH.pack(len(state)) + state
    name = sender.name(owner)
    sealer = sender.sealer(name, keys)
    if sealer is not None:
        body = sealer.part(body, PREAMBLE_SIZE)
    front = pack_preamble(Magic.STATE, FEATURE_ENCRYPTED if sealer else 0)
    await sender.send(name, (front, body), PREAMBLE_SIZE + len(body))
    return PartRef(name.key, PREAMBLE_SIZE, len(body), digest_of(body).hex())


async def read_state(reader: StoreReader, head: Head) -> bytes:
    """The state that the head names. `CorruptionError` when it is not what was written, or is not there."""
    part = head.resume
    if part is None:
        raise CorruptionError(
            f"generation {head.generation} of group {head.group} has no state of a workload"
        )
    check_keys(head.group, head.keys, reader.keys)
    if part.length > _LENGTH.size + STATE_SIZE_MAX + OVERHEAD:
        raise CorruptionError(f"{part.key} would hold {part.length} bytes of state")
    data = await reader.read_object(part.key)
    if data is None:
        raise CorruptionError(f"{part.key}, which holds the state of the workload, is gone")
    if parse_preamble(data, Magic.STATE) != (FEATURE_ENCRYPTED if reader.keys else 0):
        raise CorruptionError(f"{part.key} is encrypted, or should be, and is not")
    body = bytes(data[part.offset : part.offset + part.length])
    if digest_of(body).hex() != part.digest:
        raise CorruptionError(f"{part.key} does not have its digest")
    body = bytes(reader.unseal(body, part)[0])
    (length,) = _LENGTH.unpack_from(body)
    if length != len(body) - _LENGTH.size:
        raise CorruptionError(f"{part.key} has {len(body)} bytes for a state of {length}")
    return body[_LENGTH.size :]
