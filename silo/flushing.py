"""What a flush of a guest makes durable: the local disk (``local``), or the store, too (``store``).

With ``store`` a flush returns when the local disk *and* a committed generation hold everything that was acknowledged
before it: what an ``fsync`` has confirmed survives the loss of the host. The disk as well, because a host that comes
back after a power loss trusts its disk more than the store: what is on it and differs is the newer content.

Flushes share commits. One that finds nothing dirty costs no request. One that comes while a cut is under way waits
for the next, as do all others that come meanwhile; so however many there are, each commit answers all that came
before its cut was taken.

A flush that cannot be answered in time fails, and so does every one after the group was fenced. Nothing is lost by
that: what was dirty is dirty, and the next flush that succeeds covers it. While a migration holds commits back the time
does not count, because its end is the migration's to decide.
"""

from __future__ import annotations

import asyncio

from silo.errors import ClosedError, InvalidRequestError, UnavailableError
from silo.group import Group
from silo.storelink import StoreLink
from silo.tasks import task_group
from silo.volume import Volume

__all__ = ["FLUSHES", "StoreFlush", "store_flush"]

FLUSHES = ("local", "store")
"""How durable a flush can be."""

LOOK_S = 0.2
"""How often a flush looks whether a group that has just arrived is synced already."""


def store_flush(group: Group, link: StoreLink | None, flush: str) -> StoreFlush | None:
    """What makes a group's flushes reach the store, when ``flush`` says so; `InvalidRequestError` without a store."""
    if flush not in FLUSHES:
        raise InvalidRequestError(f"a flush cannot be {flush!r}", hint=f"say {' or '.join(FLUSHES)}")
    if flush == "local":
        return None
    if link is None:
        raise InvalidRequestError(
            f"flushes of group {group.name} cannot reach a store, because it has none",
            hint="open it with a store",
        )
    return StoreFlush(group, link, link.flush_timeout_s)


class StoreFlush:
    """The flushes of one group that reach the store. Concurrent calls are what it is for."""

    def __init__(self, group: Group, link: StoreLink, timeout_s: float) -> None:
        self._group = group
        self._link = link
        self._timeout_s = timeout_s

    async def flush(self, volume: Volume) -> None:
        """Return when everything acknowledged before this call is on the disk and in the store.

        `FencedError` when another host owns the group, `UnavailableError` when the store has not taken it in time,
        `ClosedError` when the group was closed. Cancellation leaves nothing behind but a cut that comes early.
        """
        async with task_group() as tasks:
            tasks.create_task(volume.flush())
            tasks.create_task(self._store())

    async def _store(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._commit()
            except TimeoutError:
                if not self._link.holds_commits:
                    raise UnavailableError(
                        f"the store has not taken a flush of group {self._group.name} in {self._timeout_s:g} s",
                        hint="what was written is on the local disk, and is stored when the store answers",
                    ) from None

    async def _commit(self) -> None:
        while (syncer := self._link.syncer) is None:
            if self._group.gate.error is not None:
                raise ClosedError(f"group {self._group.name} is not served here any more")
            await asyncio.sleep(LOOK_S)
        if self._group.gate.error is not None:
            raise self._group.gate.error.with_traceback(None)
        if self._group.exposed_bytes:
            await syncer.sync_now()
