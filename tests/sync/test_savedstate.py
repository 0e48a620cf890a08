"""The state of a workload in the store: what was written, or an error."""

from __future__ import annotations

import msgspec
import pytest

from silo.abc import STATE_SIZE_MAX
from silo.clock import SystemClock
from silo.errors import CapacityError, CorruptionError, InvalidRequestError
from silo.sync.cipher import KeyRing
from silo.sync.claim import Owner
from silo.sync.head import Head, PartRef, WriterState
from silo.sync.memory_store import MemoryStore
from silo.sync.reader import StoreReader
from silo.sync.savedstate import read_state, write_state
from silo.sync.sender import ObjectSender
from silo.sync.settings import FetchSettings, SyncSettings

OWNER = Owner(3, "0123456789abcdef")
QUICK = FetchSettings(patience_s=0.0)


def head_with(part: PartRef | None) -> Head:
    """A released head."""
    return Head(
        version=1, incompat=0, group="vm1", epoch=3, incarnation=OWNER.incarnation, nonce="n", generation=7, seq=1,
        cut_time=0.0, state=WriterState.RELEASED, volumes=(), segments=(), resume=part,
    )  # fmt: skip


@pytest.mark.parametrize("state", [b"", b"x", bytes(range(256)) * 4096])
async def test_what_was_saved_is_what_is_read(state: bytes) -> None:
    """Of any length, none included; and the head counts as hibernated."""
    clock = SystemClock()
    store = MemoryStore(clock).client()
    part = await write_state(ObjectSender(store, "vm1", SyncSettings(), clock), OWNER, state)
    head = head_with(part)
    assert head.is_hibernated
    assert not msgspec.structs.replace(head, state=WriterState.OPEN).is_hibernated
    assert not head_with(None).is_hibernated
    assert await read_state(StoreReader(store, clock, QUICK), head) == state


async def test_damage_in_any_byte_is_noticed() -> None:
    """And so are an object that is gone, a length that cannot be, and a head without a state."""
    clock = SystemClock()
    store = MemoryStore(clock).client()
    part = await write_state(ObjectSender(store, "vm1", SyncSettings(), clock), OWNER, b"precious")
    reader = StoreReader(store, clock, QUICK)
    good = bytes((await store.get(part.key)).data)
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1
        await store.put(part.key, [bytes(bad)])
        with pytest.raises(CorruptionError):
            await read_state(reader, head_with(part))
    await store.put(part.key, [good[:-1]])
    with pytest.raises(CorruptionError):
        await read_state(reader, head_with(part))
    await store.delete([part.key])
    with pytest.raises(CorruptionError, match="is gone"):
        await read_state(reader, head_with(part))
    with pytest.raises(CorruptionError, match="bytes of state"):
        await read_state(reader, head_with(msgspec.structs.replace(part, length=1 << 40)))
    with pytest.raises(CorruptionError, match="has no state"):
        await read_state(reader, head_with(None))


async def test_a_state_has_a_limit() -> None:
    """The same as in a handover."""
    clock = SystemClock()
    sender = ObjectSender(MemoryStore(clock).client(), "vm1", SyncSettings(), clock)
    with pytest.raises(CapacityError, match="at most"):
        await write_state(sender, OWNER, bytes(STATE_SIZE_MAX + 1))


async def test_an_encrypted_group_has_an_encrypted_state(clock: SystemClock) -> None:
    """It is the memory of a machine: what the disk hides is in there."""
    store = MemoryStore(clock)
    keys = KeyRing([bytes(32)])
    part = await write_state(
        ObjectSender(store.client(), "vm1", SyncSettings(), clock), OWNER, b"precious", keys
    )
    assert not any(b"precious" in data for data in store.snapshot().values())
    head = msgspec.structs.replace(head_with(part), incompat=1, keys=(keys.current,))
    assert await read_state(StoreReader(store.client(), clock, keys=keys), head) == b"precious"
    with pytest.raises(InvalidRequestError, match="there is no key"):
        await read_state(StoreReader(store.client(), clock), head)
