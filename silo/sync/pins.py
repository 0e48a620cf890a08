"""Records: copies of a head that keep a generation from the collector, and how one is made safely.

There are three kinds (`silo.sync.head.Keeping`): a *point*, which somebody may want back, under ``points/``; a
*fork*, another group that refers to the same objects, and a *reader*, both under ``pins/``. `Keeper.keep` follows
safety rule 17: it writes the record, then looks whether what it rests on still holds, and withdraws it if not. What a
record may rest on is the head (its floor), or another record.

A reader's pin counts for a day by the store's clock; so does that of a fork that was never finished, or is gone
without having let go. A reader that takes longer finds objects missing and fails; it never reads zeros.

Nothing here deletes anything but records.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import msgspec

from silo.abc import Clock, ObjectInfo, ObjectStore, StoredObject
from silo.errors import CorruptionError, InvalidRequestError, UnavailableError
from silo.sync.collection import keeps
from silo.sync.head import Head, Keeping, Kept, encode_head, parse_head, parse_record
from silo.sync.layout import head_key, pin_key, pins_prefix, point_key, points_prefix
from silo.sync.reader import StoreReader
from silo.sync.retry import bounded

__all__ = ["PIN_LASTS_S", "Keeper", "Record"]

PIN_LASTS_S = 24 * 3600.0


@attrs.frozen
class Record:
    """A record as it is in the store."""

    key: str
    head: Head
    etag: str = ""
    modified: float = 0.0
    """POSIX seconds by the store's clock."""

    @property
    def kept(self) -> Kept:
        """Why it is kept."""
        if self.head.kept is None:
            raise CorruptionError(f"{self.key} does not say why it is kept")
        return self.head.kept


class Keeper:
    """Makes, lists and withdraws the records of any group in one store. Concurrent calls are allowed.

    Requests are made with the reader's patience; `UnavailableError` when that is over.
    """

    def __init__(self, store: ObjectStore, reader: StoreReader, clock: Clock) -> None:
        self._store = store
        self._reader = reader
        self._clock = clock
        self._parsed: dict[tuple[str, str], Head] = {}

    # ---- looking ------------------------------------------------------------------------------------------

    async def head(self, group: str) -> Head | None:
        """The head of a group as it is now."""
        found = await self._reader.read_object(head_key(group))
        return None if found is None else parse_head(found, group)

    async def newest(self, group: str) -> Head:
        """As `head`; `InvalidRequestError` when there is no such group, or nothing was ever committed."""
        head = await self.head(group)
        if head is None:
            raise InvalidRequestError(f"the store has no group {group!r}")
        if head.generation == 0:
            raise InvalidRequestError(
                f"group {group} has no generation yet", hint="it was created, and nothing was committed"
            )
        return head

    async def find(self, group: str, *, generation: int | None = None, at: float | None = None) -> Head:
        """A generation that can be read: the newest, the one of a number, or the last one before an instant (POSIX
        seconds). The newest is the head itself, any other a point's record.

        `InvalidRequestError` when there is none such.
        """
        newest = await self.newest(group)
        if generation in (None, newest.generation) and (at is None or newest.cut_time <= at):
            return newest
        points = [point.head for point in await self.points(group)]
        fitting = [
            point
            for point in points
            if generation in (None, point.generation) and (at is None or point.cut_time <= at)
        ]
        if not fitting:
            known = ", ".join(str(point.generation) for point in points)
            raise InvalidRequestError(
                f"group {group} has no such generation that was kept",
                hint=f"the newest is {newest.generation}; points: {known or 'none'}; see `silo point list`",
            )
        return max(fitting, key=lambda point: point.generation)

    async def points(self, group: str) -> list[Record]:
        """The kept restore points of a group, the oldest first."""
        return await self._list(group, points_prefix(group))

    async def pins(self, group: str) -> list[Record]:
        """What forks and readers need of a group, outdated pins included."""
        return await self._list(group, pins_prefix(group))

    async def records(self, group: str) -> list[Record]:
        """All of them. Whatever was written before this call is in it."""
        return [*await self.points(group), *await self.pins(group)]

    async def _list(self, group: str, prefix: str) -> list[Record]:
        async def listed() -> list[ObjectInfo]:
            return [info async for info in self._store.list(prefix)]

        found: list[Record] = []
        for info in await self._reader.patiently(listed):
            head = self._parsed.get((info.key, info.etag))
            if head is None:
                data = await self._reader.read_object(info.key)
                if data is None:
                    continue  # withdrawn since
                head = self._parsed[info.key, info.etag] = parse_record(data, group)
            found.append(Record(info.key, head, info.etag, info.modified))
        there = {(record.key, record.etag) for record in found}
        for known in [known for known in self._parsed if known[0].startswith(prefix) and known not in there]:
            del self._parsed[known]
        return found

    async def read(self, key: str, group: str) -> Record | None:
        """One record; ``None`` when there is none."""
        found = await self._reader.patiently(lambda: self._bounded_get(key))
        return None if found is None else Record(key, parse_record(found.data, group), found.etag)

    # ---- keeping ------------------------------------------------------------------------------------------

    async def keep_newest(
        self, group: str, why: Keeping, *, label: str = "", holder: str = "", token: str = ""
    ) -> Record:
        """Keep the newest generation of a group. Starts again as often as the collector is faster.

        A point of that generation that exists already is returned as it is. ``token`` names a pin, else chance does.
        Cancellation may leave a record behind.
        """
        while True:
            head = await self.newest(group)
            if head.gc_floor > head.generation:
                raise UnavailableError(f"group {group} is being deleted", hint="or it was, and that failed")
            if why is Keeping.POINT:
                key = point_key(group, head.generation)
            else:
                key = pin_key(group, token or self._token())
            record, is_ours = await self._write(key, head, Kept(why, self._clock.wall(), label, holder))
            if not is_ours or keeps(record.head, await self.head(group)):
                return record
            await self.withdraw(record.key)

    async def keep_record(
        self, base: Record, why: Keeping, *, holder: str = "", token: str = ""
    ) -> Record | None:
        """Keep what another record keeps, by a pin of one's own; ``None`` when the other was withdrawn meanwhile."""
        group = base.head.group
        kept = Kept(why, self._clock.wall(), "", holder)
        record, _ = await self._write(pin_key(group, token or self._token()), base.head, kept)
        if await self.read(base.key, group) is not None:
            return record
        await self.withdraw(record.key)
        return None

    async def relabel(self, record: Record, label: str) -> Record:
        """Give a point another label. `UnavailableError` when it was changed or deleted meanwhile."""
        kept = msgspec.structs.replace(record.kept, label=label)
        head = msgspec.structs.replace(record.head, kept=kept, nonce=self._token())
        body = encode_head(head)
        parse_record(body, head.group)  # a label that cannot be read back must not get there
        etag = await self._reader.patiently(lambda: self._bounded_put(record.key, body, match=record.etag))
        if etag is None:
            now = await self.read(record.key, head.group)
            if now is None or now.head.nonce != head.nonce:
                raise UnavailableError(f"{record.key} was changed at the same time", hint="try again")
        return Record(record.key, head, etag or "")

    async def withdraw(self, *keys: str) -> None:
        """Delete records. Those that are gone are no error."""
        if keys:
            await self._reader.patiently(
                lambda: bounded(
                    lambda: self._store.delete(keys), self._reader.settings.retry.request_timeout_s
                )
            )

    @asynccontextmanager
    async def reading(self, group: str, body: Head) -> AsyncIterator[Head]:
        """Keep a generation for as long as the block lasts: ``body`` is a head, or the head of a point.

        Whoever may not write to the store goes without a pin: should the collector be faster, it finds objects
        missing. `InvalidRequestError` when the generation is gone before it begins.
        """
        pin: Record | None = None
        try:
            if body.kept is not None:
                base = Record(point_key(group, body.generation), body)
                pin = await self.keep_record(base, Keeping.READER)
                if pin is None:
                    raise InvalidRequestError(f"the point of generation {body.generation} was deleted")
            else:
                pin = await self.keep_newest(group, Keeping.READER)
        except InvalidRequestError:
            if not await self._still_there(group, body):
                raise
        try:
            yield pin.head if pin is not None else body
        finally:
            if pin is not None:
                with contextlib.suppress(UnavailableError):  # then it ends by itself, after a day
                    await self.withdraw(pin.key)

    async def _still_there(self, group: str, body: Head) -> bool:
        if body.kept is None:
            return await self.head(group) is not None
        return await self.read(point_key(group, body.generation), group) is not None

    # ---- what is outdated ---------------------------------------------------------------------------------

    async def outdated(self, pins: list[Record]) -> list[Record]:
        """The pins that count no more: readers that are gone, and forks that do not name them, both after a day."""
        old = [pin for pin in pins if self._clock.wall() - pin.modified > PIN_LASTS_S]
        return [pin for pin in old if pin.kept.why is Keeping.READER or not await self._is_named(pin)]

    async def _is_named(self, pin: Record) -> bool:
        holder = await self.head(pin.kept.holder)
        return holder is not None and pin.key in holder.parents

    # ---- requests -----------------------------------------------------------------------------------------

    async def _write(self, key: str, head: Head, kept: Kept) -> tuple[Record, bool]:
        """A record under this key, and whether it is the one that was to be written: an earlier point of the same
        generation stands."""
        made = msgspec.structs.replace(head, kept=kept, nonce=self._token())
        body = encode_head(made)
        parse_record(body, made.group)
        etag = await self._reader.patiently(lambda: self._bounded_put(key, body, match=None))
        if etag is not None:
            return Record(key, made, etag), True
        found = await self.read(key, made.group)
        if found is None:
            raise UnavailableError(f"{key} came and went while it was written", hint="try again")
        return found, found.head.nonce == made.nonce  # ours after all, when an answer was lost

    def _token(self) -> str:
        return self._clock.token(16).hex()

    async def _bounded_get(self, key: str) -> StoredObject | None:
        return await bounded(lambda: self._store.get(key), self._reader.settings.retry.request_timeout_s)

    async def _bounded_put(self, key: str, body: bytes, *, match: str | None) -> str | None:
        return await bounded(
            lambda: self._store.put_if(key, [body], match=match),
            self._reader.settings.retry.request_timeout_s,
        )
