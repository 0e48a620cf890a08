"""What can be done with a group in its store without serving it: points, forks, verifying, collecting, counting.

Each function opens the store at a URL, does one thing, and closes it again; what ``silo point``, ``fork``, ``delete``,
``verify``, ``gc`` and ``cost`` do with ``--store``. Results are plain values; sizes in bytes, times in POSIX seconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs

from silo.abc import Clock, ObjectStore
from silo.clock import SystemClock
from silo.errors import InvalidRequestError
from silo.sync.cipher import KeyRing
from silo.sync.collector import Collector
from silo.sync.cost import MONTH_S, PriceTable, Usage, monthly_cost
from silo.sync.fork import delete_group, fork_group
from silo.sync.head import Keeping
from silo.sync.layout import point_key, segments_prefix
from silo.sync.manifest import Manifest
from silo.sync.pins import Keeper, Record
from silo.sync.reader import StoreReader
from silo.sync.released import ReleasedAuthority
from silo.sync.store_url import open_store
from silo.sync.verify import VerifyProgress, verify_generation

__all__ = [
    "collect",
    "create_point",
    "delete",
    "delete_point",
    "fork",
    "list_points",
    "point_row",
    "stored_cost",
    "verify",
]

DAY_S = 24 * 3600.0


@attrs.frozen
class _Opened:
    store: ObjectStore
    reader: StoreReader
    clock: Clock
    keeper: Keeper


@asynccontextmanager
async def _opened(url: str, keys: KeyRing | None = None) -> AsyncIterator[_Opened]:
    clock = SystemClock()
    store = open_store(url, clock)
    try:
        reader = StoreReader(store, clock, keys=keys)
        yield _Opened(store, reader, clock, Keeper(store, reader, clock))
    finally:
        await store.aclose()


def point_row(point: Record) -> dict[str, Any]:
    """A point as commands show it."""
    return {
        "generation": point.head.generation,
        "cut_time": point.head.cut_time,
        "created": point.kept.created,
        "label": point.kept.label,
        "size": sum(volume.size for volume in point.head.volumes),
    }


async def list_points(store: str, group: str) -> list[dict[str, Any]]:
    """The kept restore points of a group, the oldest first."""
    async with _opened(store) as it:
        await it.keeper.newest(group)
        return [point_row(point) for point in await it.keeper.points(group)]


async def make_point(keeper: Keeper, group: str, label: str) -> dict[str, Any]:
    """Keep the newest generation; an automatic point of it gets the label."""
    point = await keeper.keep_newest(group, Keeping.POINT, label=label)
    if point.kept.label != label:
        if point.kept.label:
            raise InvalidRequestError(
                f"generation {point.head.generation} of group {group} is kept already, "
                f"as {point.kept.label!r}"
            )
        point = await keeper.relabel(point, label)
    return point_row(point)


async def create_point(store: str, group: str, label: str) -> dict[str, Any]:
    """Keep the newest generation of a group."""
    async with _opened(store) as it:
        return await make_point(it.keeper, group, label)


async def drop_point(keeper: Keeper, group: str, generation: int) -> dict[str, Any]:
    """Keep a generation no longer. `InvalidRequestError` when it is no point."""
    key = point_key(group, generation)
    found = await keeper.read(key, group)
    if found is None:
        raise InvalidRequestError(
            f"group {group} has no point of generation {generation}", hint="see `silo point list`"
        )
    await keeper.withdraw(key)
    return point_row(found)


async def delete_point(store: str, group: str, generation: int) -> dict[str, Any]:
    """As `drop_point`. Its space is free after the collector's next pass."""
    async with _opened(store) as it:
        return await drop_point(it.keeper, group, generation)


async def fork(
    store: str, source: str, group: str, generation: int | None = None, at: float | None = None
) -> dict[str, Any]:
    """Make a new group that begins as a generation of another one. As `fork_group`."""
    async with _opened(store) as it:
        head = await fork_group(it.store, it.reader, it.clock, source, group, generation=generation, at=at)
    return {
        "group": group,
        "source": source,
        "cut_time": head.cut_time,
        "volumes": [{"name": volume.name, "size": volume.size} for volume in head.volumes],
    }


async def delete(store: str, group: str, *, force: bool = False) -> dict[str, Any]:
    """Delete a group from the store. As `delete_group`."""
    async with _opened(store) as it:
        deleted = await delete_group(it.store, it.reader, it.clock, group, force=force)
    return {"group": group, "deleted_bytes": deleted}


async def verify(
    store: str,
    group: str,
    *,
    generation: int | None = None,
    sample: float = 1.0,
    progress: VerifyProgress | None = None,
    keys: KeyRing | None = None,
) -> dict[str, Any]:
    """Compare all digests of a generation, or of a sample of its chunks. As `verify_generation`."""
    async with _opened(store, keys) as it:
        chosen = await it.keeper.find(group, generation=generation)
        async with it.keeper.reading(group, chosen) as head:
            manifest = await Manifest.open(head, it.reader)
            try:
                report = await verify_generation(
                    manifest, it.reader, it.clock, sample=sample, progress=progress
                )
            finally:
                manifest.close()
    return {"group": group, "sound": report.is_sound, **attrs.asdict(report)}


async def collect(store: str, group: str, *, dry_run: bool, keys: KeyRing | None = None) -> dict[str, Any]:
    """Delete what a group that nobody serves needs no longer. As `Collector.collect`, without grace."""
    async with _opened(store, keys) as it:
        manifest = await Manifest.open(await it.keeper.newest(group), it.reader)
        try:
            authority = ReleasedAuthority(it.store, it.reader, it.clock, manifest)
            report = await Collector(it.store, it.reader, it.clock, authority).collect(
                grace_s=0.0, dry_run=dry_run
            )
        finally:
            manifest.close()
    return {"group": group, "dry_run": dry_run, **attrs.asdict(report)}


async def stored_cost(store: str, group: str, prices: PriceTable) -> dict[str, Any]:
    """What a month costs, as far as the store alone can tell: what it holds, and a PUT of an object and one of the
    head for each object of the last day."""
    async with _opened(store) as it:
        newest = await it.keeper.newest(group)
        stored = recent = 0
        async for info in it.store.list(segments_prefix(group)):
            stored += info.size
            recent += it.clock.wall() - info.modified < DAY_S
    usage = Usage(elapsed_s=DAY_S, puts=2 * recent, stored_bytes=stored)
    return cost_row(newest.group, usage, prices) | {"estimated": True}


def cost_row(group: str, usage: Usage, prices: PriceTable) -> dict[str, Any]:
    """A cost as commands show it."""
    cost = monthly_cost(usage, prices)
    return {
        "group": group,
        "elapsed_s": min(usage.elapsed_s, MONTH_S),
        **attrs.asdict(cost),
        "total": cost.total,
        "estimated": False,
    }
