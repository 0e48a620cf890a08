"""The collector: deletes what nobody needs any more, and sees to it that segments become so.

One *pass* follows `silo.sync.collection` step by step: see what the newest generation does not reach; raise the floor
in the head; list the records; delete what none of them reaches. Where something cannot be read, nothing is deleted.
What is true at the end of a pass that was cancelled anywhere is that everything needed is there.

A pass is made on behalf of whoever may change the head (`Authority`): the owner that serves the group, or, when the
last owner released it, anybody who holds on to that very head (`silo.sync.released`). Only the owner's passes compact
(`silo.sync.compaction`): they mark live chunks of emptying segments as dirty, so that the next cut stores them again
from the local disk, and no byte is fetched for it. Chunks that are not on the local disk are left where they are.

A group that refers to other groups' objects keeps them with pins there. Such a pin is let go when nothing that this
group has, its own records included, refers to the other group any more; the order is the same: floor, records,
deletion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

import attrs

from silo.abc import Clock, ObjectStore
from silo.sync.census import Census
from silo.sync.collection import Docket, Horizon, deletable, floor_for
from silo.sync.compaction import Filling, choose_segments
from silo.sync.head import Head
from silo.sync.layout import parse_pin_key, parse_segment_key, segments_prefix
from silo.sync.manifest import Manifest
from silo.sync.pins import Keeper, Record
from silo.sync.reader import StoreReader
from silo.sync.retry import bounded

__all__ = ["Authority", "Collector", "PassReport"]

DELETE_BATCH = 500

WORN_MIN = 64 * 1024
"""Bytes of segments that only the head's list still names: below that no root is written for their sake."""


class Authority(Protocol):
    """On whose behalf a pass is made."""

    def may_delete(self) -> bool:
        """Whether nobody reads, without a record, through a generation that is older than the newest."""
        ...

    @property
    def manifest(self) -> Manifest:
        """The newest generation, with its head."""
        ...

    def horizon(self) -> Horizon:
        """Which keys may be judged at this instant."""
        ...

    async def raise_floor(self, floor: int, needless_parents: frozenset[str]) -> Head:
        """Commit a head with at least this floor and without these parents, and return it. `FencedError` when the
        group is another's."""
        ...

    async def rewrite(self, keys: frozenset[str]) -> int:
        """Have the chunks that are in these segments stored again with the next cut. The bytes of content that will
        be; 0 from an authority that stores nothing."""
        ...

    def want_checkpoint(self) -> None:
        """The next commit had better have a new root, so that segments which it lists are not needed any more."""
        ...


@attrs.frozen(kw_only=True)
class PassReport:
    """What a pass saw and did. Sizes in bytes."""

    generation: int = 0
    stored_bytes: int = 0
    """Everything under the group's ``segments/``."""
    stored_objects: int = 0
    live_bytes: int = 0
    """Payloads of the group's own, with their entries, that the newest generation refers to."""
    record_bytes: int = 0
    """Objects that only records keep."""
    dead_bytes: int = 0
    """Objects that nothing needs, and that are left alone for a while."""
    dead_objects: int = 0
    deleted_bytes: int = 0
    deleted_objects: int = 0
    rewritten_bytes: int = 0
    """Content that is stored again so that segments become empty."""
    released_pins: int = 0
    points: int = 0
    forks: tuple[str, ...] = ()
    """Groups that refer to objects of this one."""


@attrs.frozen
class _Look:
    """What the first half of a pass found out."""

    listed: dict[str, int]
    live: Counter[str]
    head: Head


class Collector:
    """See the module. `collect` is called by one task at a time."""

    def __init__(self, store: ObjectStore, reader: StoreReader, clock: Clock, authority: Authority) -> None:
        self.keeper = Keeper(store, reader, clock)
        self._store = store
        self._reader = reader
        self._clock = clock
        self._authority = authority
        self._census = Census(reader)
        self._docket = Docket()
        self._needless: dict[str, int] = {}
        """Pins in other groups that the newest head does not need, and the generation that was seen to be so."""

    async def collect(self, *, grace_s: float, budget: int = 0, dry_run: bool = False) -> PassReport:
        """Make one pass: delete what has been dead for ``grace_s``, and have at most ``budget`` bytes of content stored
        again. With ``dry_run`` nothing is changed; what a pass without grace would delete counts as deleted.

        `UnavailableError` and `CorruptionError` when something could not be read, `FencedError` when the group is
        another's: nothing was deleted that anybody needs. Cancellation leaves the same.
        """
        look = await self._look()
        if dry_run:
            records = await self._records(look.head)
            pinned = await self._pinned(records)
            return self._report(
                look, records, pinned, [key for key in self._docket.dead if key not in pinned]
            )
        ripe = self._docket.ripe(self._clock.monotonic(), grace_s)
        needless = {pin: floor for pin, floor in self._needless.items() if pin in look.head.parents}
        floor = max(floor_for(ripe), *needless.values(), 0) if needless else floor_for(ripe)
        head = look.head
        if floor > head.gc_floor:
            head = await self._authority.raise_floor(floor, frozenset())
        # From here on every record that could need something dead is in this list, or will be withdrawn.
        records = await self._records(head)
        pinned = await self._pinned(records)
        released = await self._release_parents(needless, pinned)
        # No await from here to the first deletion.
        doomed = deletable(ripe, head.gc_floor, pinned) if self._authority.may_delete() else []
        report = self._report(look, records, pinned, doomed)
        await self._delete(doomed)
        rewritten = await self._compact(look, pinned, budget)
        return attrs.evolve(report, rewritten_bytes=rewritten, released_pins=released)

    # ---- looking ------------------------------------------------------------------------------------------

    async def _look(self) -> _Look:
        horizon = self._authority.horizon()
        listed = await self._reader.patiently(self._list)
        live = await self._census.newest(self._authority.manifest)
        head = self._authority.manifest.head
        self._docket.judge(listed, live, horizon, head.generation, self._clock.monotonic())
        groups = groups_of(live)
        self._needless = {
            pin: self._needless.get(pin, head.generation)
            for pin in head.parents
            if parse_pin_key(pin)[0] not in groups
        }
        return _Look(listed, live, head)

    async def _list(self) -> dict[str, int]:
        prefix = segments_prefix(self._authority.horizon().group)
        return {info.key: info.size async for info in self._store.list(prefix)}

    async def _records(self, head: Head) -> list[Record]:
        """Those that count."""
        pins = await self.keeper.pins(head.group)
        outdated = await self.keeper.outdated(pins)
        return [*await self.keeper.points(head.group), *(pin for pin in pins if pin not in outdated)]

    async def _pinned(self, records: Iterable[Record]) -> set[str]:
        pinned: set[str] = set()
        for record in records:
            pinned |= await self._census.record(record.key, record.head)
        self._census.forget_all_but(record.key for record in records)
        return pinned

    # ---- doing --------------------------------------------------------------------------------------------

    async def _delete(self, keys: list[str]) -> None:
        for start in range(0, len(keys), DELETE_BATCH):
            await self._delete_batch(keys[start : start + DELETE_BATCH])

    async def _delete_batch(self, keys: list[str]) -> None:
        timeout_s = self._reader.settings.retry.request_timeout_s
        await self._reader.patiently(lambda: bounded(lambda: self._store.delete(keys), timeout_s))
        self._docket.gone(keys)

    async def _release_parents(self, needless: Mapping[str, int], pinned: set[str]) -> int:
        """Let go of parents that neither the newest head nor any record refers to; first in the head."""
        groups = groups_of(pinned)
        pins = frozenset(pin for pin in needless if parse_pin_key(pin)[0] not in groups)
        if pins:
            await self._authority.raise_floor(0, pins)
            await self.keeper.withdraw(*pins)
        return len(pins)

    async def _compact(self, look: _Look, pinned: set[str], budget: int) -> int:
        if budget <= 0:
            return 0
        fillings = self._fillings(look, pinned)
        worn = sum(filling.size for filling in fillings.values() if not filling.live)
        live = sum(filling.live for filling in fillings.values())
        if worn > max(WORN_MIN, live // 10):
            self._authority.want_checkpoint()
        return await self._authority.rewrite(frozenset(choose_segments(fillings, budget=budget)))

    def _fillings(self, look: _Look, pinned: set[str]) -> dict[str, Filling]:
        """The segments that the head reaches, that are the group's own, and that no record keeps."""
        named = {segment.key for segment in look.head.segments}
        return {
            key: Filling(size, look.live[key])
            for key, size in look.listed.items()
            if key in look.live and key not in pinned and (look.live[key] or key in named)
        }

    # ---- telling ------------------------------------------------------------------------------------------

    def _report(
        self, look: _Look, records: list[Record], pinned: set[str], doomed: Iterable[str]
    ) -> PassReport:
        dead = self._docket.dead
        deleted = {key: dead[key].size for key in doomed}
        waiting = {key: found.size for key, found in dead.items() if key not in pinned and key not in deleted}
        return PassReport(
            generation=look.head.generation,
            stored_bytes=sum(look.listed.values()),
            stored_objects=len(look.listed),
            live_bytes=sum(size for key, size in look.live.items() if key in look.listed),
            record_bytes=sum(found.size for key, found in dead.items() if key in pinned),
            dead_bytes=sum(waiting.values()),
            dead_objects=len(waiting),
            deleted_bytes=sum(deleted.values()),
            deleted_objects=len(deleted),
            points=sum("/points/" in record.key for record in records),
            forks=tuple(sorted({record.kept.holder for record in records if record.kept.holder})),
        )


def groups_of(keys: Iterable[str]) -> set[str]:
    """The groups that own these segments."""
    return {parse_segment_key(key).group for key in keys}
