"""Forks: a new group that begins as a generation of another one, and shares its objects.

A fork is made by writing records and one head, whatever the size of the disks. It is a group like any other from then
on: it can be opened at once, lazily, and writes under its own name. What it shares is kept by a *pin* in every group
that owns some of it; the keys of these pins stand in its head as ``parents``. The order keeps safety rule 17::

    1  write a pin in the source, and in each of the source's parents; check what each of them rests on
    2  create the head, which names the pins
    3  see that the pins are still there; else take the head back

A pin whose group does not name it counts for a day, so a fork that died between 1 and 2 costs space for that long.
Step 3 is for one that slept longer than that. Deleting a group lets its pins go; so does its collector, when it
refers to a parent no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from silo.abc import Clock, ObjectInfo, ObjectStore
from silo.errors import InvalidRequestError, UnavailableError
from silo.names import check_group_name
from silo.sync.head import Head, Keeping, WriterState, encode_head
from silo.sync.layout import head_key, parse_pin_key, point_key
from silo.sync.pins import Keeper, Record
from silo.sync.reader import StoreReader
from silo.sync.released import change_released
from silo.sync.retry import bounded

__all__ = ["delete_group", "fork_group"]

ATTEMPTS = 5
DELETE_BATCH = 500


async def fork_group(
    store: ObjectStore,
    reader: StoreReader,
    clock: Clock,
    source: str,
    group: str,
    *,
    generation: int | None = None,
    at: float | None = None,
) -> Head:
    """Make ``group`` a fork of ``source``: of its newest generation, or of a kept one (see `Keeper.find`).

    Returns the head of the new group, which anybody may open. `InvalidRequestError` when it exists already or there is
    no such generation, `UnavailableError` when the store does not answer. Then, and after a cancellation, pins may be
    left behind that count for a day.
    """
    check_group_name(group)
    keeper = Keeper(store, reader, clock)
    if await keeper.head(group) is not None:
        raise InvalidRequestError(f"the store has a group {group!r} already")
    for _ in range(ATTEMPTS):
        pins = await _pin_all(keeper, await keeper.find(source, generation=generation, at=at), group)
        if pins is not None:
            return await _create(store, reader, clock, keeper, pins, group)
    raise UnavailableError(
        f"generation of group {source} went away while it was being forked", hint="try again"
    )


async def _pin_all(keeper: Keeper, body: Head, holder: str) -> list[Record] | None:
    """A pin in the group of ``body``, which comes first, and in each of its parents; ``None`` when one of them was
    withdrawn meanwhile."""
    pins: list[Record] = []
    if body.kept is not None:
        base: Record | None = Record(point_key(body.group, body.generation), body)
        pin = await keeper.keep_record(base, Keeping.FORK, holder=holder) if base else None
    else:
        pin = await keeper.keep_newest(body.group, Keeping.FORK, holder=holder)
    if pin is None:
        return None
    pins.append(pin)
    for key in pin.head.parents:
        base = await keeper.read(key, parse_pin_key(key)[0])
        pin = await keeper.keep_record(base, Keeping.FORK, holder=holder) if base is not None else None
        if pin is None:
            await keeper.withdraw(*(made.key for made in pins))
            return None
        pins.append(pin)
    return pins


async def _create(
    store: ObjectStore, reader: StoreReader, clock: Clock, keeper: Keeper, pins: Sequence[Record], group: str
) -> Head:
    keys = tuple(pin.key for pin in pins)
    head = msgspec.structs.replace(
        pins[0].head,
        group=group,
        epoch=1,
        incarnation=clock.token(8).hex(),
        nonce=clock.token(16).hex(),
        generation=1,
        seq=0,
        state=WriterState.RELEASED,
        gc_floor=0,
        claim=None,
        lease_s=None,
        intent=None,
        resume=None,
        parents=keys,
        kept=None,
    )
    body = encode_head(head)
    timeout_s = reader.settings.retry.request_timeout_s
    key = head_key(group)
    etag = await reader.patiently(lambda: bounded(lambda: store.put_if(key, [body], match=None), timeout_s))
    if etag is None:
        found = await keeper.head(group)
        if found is None or found.nonce != head.nonce:
            await keeper.withdraw(*keys)
            raise InvalidRequestError(f"the store has a group {group!r} already")
    for pin in pins:
        if await keeper.read(pin.key, pin.head.group) is None:
            await keeper.withdraw(key, *keys)
            raise UnavailableError(f"the pins of group {group} were not kept long enough", hint="try again")
    return head


async def delete_group(
    store: ObjectStore, reader: StoreReader, clock: Clock, group: str, *, force: bool = False
) -> int:
    """Delete a group with everything that it has in the store, and let go of what it shares. Returns the bytes that
    were deleted.

    `InvalidRequestError` when a host serves it (``force``: whoever calls asserts that none does any more), or another
    group was forked from it and still refers to it. A call that failed can be repeated.
    """
    keeper = Keeper(store, reader, clock)
    head = await keeper.head(group)
    if head is not None:
        head = await _retire(store, reader, clock, keeper, head, force=force)
    await keeper.withdraw(*(point.key for point in await keeper.points(group)))
    # A fork may have been made from one of the points in the meantime.
    await _refuse_forks(keeper, group)
    await keeper.withdraw(head_key(group))
    deleted = await _delete_all(store, reader, keeper, f"{group}/")
    if head is not None:
        await keeper.withdraw(*head.parents)
    return deleted


async def _retire(
    store: ObjectStore, reader: StoreReader, clock: Clock, keeper: Keeper, head: Head, *, force: bool
) -> Head:
    """From here on nobody can pin the newest generation any more, and nobody has."""
    if head.state is not WriterState.RELEASED and not force:
        raise InvalidRequestError(
            f"group {head.group} is served by a host, or its host died",
            hint="stop it first; or say that its host is dead",
        )
    await _refuse_forks(keeper, head.group)
    floor = head.gc_floor
    retired = await change_released(
        store, reader, clock, head, lambda old: msgspec.structs.replace(old, gc_floor=old.generation + 1)
    )
    try:
        await _refuse_forks(keeper, head.group)
    except InvalidRequestError:
        await change_released(
            store, reader, clock, retired, lambda old: msgspec.structs.replace(old, gc_floor=floor)
        )
        raise
    return retired


async def _refuse_forks(keeper: Keeper, group: str) -> None:
    pins = await keeper.pins(group)
    outdated = await keeper.outdated(pins)
    forks = {pin.kept.holder for pin in pins if pin not in outdated and pin.kept.why is Keeping.FORK}
    if forks:
        raise InvalidRequestError(
            f"group {group} shares objects with {', '.join(sorted(forks))}", hint="delete those first"
        )


async def _delete_all(store: ObjectStore, reader: StoreReader, keeper: Keeper, prefix: str) -> int:
    async def listed() -> list[ObjectInfo]:
        return [info async for info in store.list(prefix)]

    found = await reader.patiently(listed)
    for start in range(0, len(found), DELETE_BATCH):
        await keeper.withdraw(*(info.key for info in found[start : start + DELETE_BATCH]))
    return sum(info.size for info in found)
