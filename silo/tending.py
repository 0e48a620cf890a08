"""The daemon's verbs about what a group has in its store: points, the collector, the bill.

The daemon owns these groups, so it can do at once what others must ask for: commit what is dirty before a point is
made, raise the collector's floor, count every request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs

from silo.abc import Clock
from silo.control import Result, Verb
from silo.errors import InvalidRequestError
from silo.hosted import HostedGroup
from silo.keeping import cost_row, drop_point, make_point, point_row
from silo.storelink import StoreLink
from silo.sync.caretaker import Caretaker
from silo.sync.cost import PriceTable, Usage
from silo.sync.layout import segments_prefix
from silo.sync.pins import Keeper

__all__ = ["StoreVerbs"]


class StoreVerbs:
    """See the module. ``find`` gives the group of a name, or raises."""

    def __init__(self, find: Callable[[str], HostedGroup], clock: Clock, prices: PriceTable) -> None:
        self._find = find
        self._clock = clock
        self._prices = prices

    def verbs(self) -> dict[str, Verb]:
        """What the control socket offers."""
        return {
            "points": self.points,
            "point_create": self.point_create,
            "point_delete": self.point_delete,
            "gc": self.gc,
            "cost": self.cost,
        }

    def _link(self, group: str) -> StoreLink:
        hosted = self._find(group)
        if hosted.link is None:
            raise InvalidRequestError(f"group {group} has no store", hint="open it with a store")
        return hosted.link

    def _keeper(self, group: str) -> Keeper:
        link = self._link(group)
        return Keeper(link.store, link.reader, self._clock)

    def _caretaker(self, group: str) -> Caretaker:
        link = self._link(group)
        if link.caretaker is None or not link.may_tidy():
            raise InvalidRequestError(
                f"group {group} is {self._find(group).phase}", hint="its store is tidied while it runs here"
            )
        return link.caretaker

    async def points(self, group: str) -> AsyncIterator[Any]:
        """The kept restore points, the oldest first."""
        points = await self._keeper(group).points(group)
        yield Result({"points": [point_row(point) for point in points]})

    async def point_create(self, group: str, label: str) -> AsyncIterator[Any]:
        """Store what is dirty, and keep the generation that holds it."""
        await self._find(group).sync_now()
        await self._caretaker(group).fold(hurry=True)
        yield Result(await make_point(self._keeper(group), group, label))

    async def point_delete(self, group: str, generation: int) -> AsyncIterator[Any]:
        """Keep a generation no longer."""
        yield Result(await drop_point(self._keeper(group), group, generation))

    async def gc(self, group: str, dry_run: bool = False, grace_s: float | None = None) -> AsyncIterator[Any]:
        """A pass of the collector now; a second one when the first has made more collectable."""
        caretaker = self._caretaker(group)
        report = await caretaker.collect(grace_s=grace_s, dry_run=dry_run, hurry=True)
        if not dry_run:
            await self._find(group).sync_now()
            again = await caretaker.collect(grace_s=grace_s, hurry=True)
            report = attrs.evolve(
                again,
                deleted_bytes=report.deleted_bytes + again.deleted_bytes,
                deleted_objects=report.deleted_objects + again.deleted_objects,
                rewritten_bytes=report.rewritten_bytes + again.rewritten_bytes,
                released_pins=report.released_pins + again.released_pins,
            )
        yield Result({"group": group, "dry_run": dry_run, **attrs.asdict(report)})

    async def cost(self, group: str, prices: dict[str, Any] | None = None) -> AsyncIterator[Any]:
        """What a month costs, by what was counted since the group was opened."""
        link = self._link(group)
        requests, out_bytes = link.store.requests.copy(), link.store.out_bytes
        elapsed_s = self._clock.monotonic() - link.opened_at
        stored = 0
        async for info in link.store.list(segments_prefix(group)):
            stored += info.size
        usage = Usage(
            elapsed_s=elapsed_s,
            puts=requests["put"] + requests["list"],
            gets=requests["get"] + requests["head"],
            out_bytes=out_bytes,
            stored_bytes=stored,
        )
        yield Result(cost_row(group, usage, PriceTable(**prices) if prices else self._prices))
