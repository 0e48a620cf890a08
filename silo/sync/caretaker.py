"""What the owner of a group does for its store beside committing: collecting, points, and the list of first reads.

One task per group, for as long as the group is served and does not move (`silo.storelink` starts it). It costs nothing
while nothing is committed. Whatever goes wrong is told (``error``) and tried again later: none of this is needed to
keep what the guest has written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import attrs
import numpy as np

from silo.abc import Clock, ObjectStore
from silo.chunkmap import RESIDENCY_MASK, SYNC_DIRTY, Indices, Residency
from silo.errors import ClosedError, FencedError, InvariantError, SiloError
from silo.group import Group
from silo.sync.claim import owner_of
from silo.sync.codec import Kind, digest_of
from silo.sync.collection import Horizon
from silo.sync.collector import Collector, PassReport
from silo.sync.committed import VolumeMap
from silo.sync.head import Head, Keeping
from silo.sync.hotlist import choose_hot, encode_hot
from silo.sync.manifest import Manifest
from silo.sync.pins import Record
from silo.sync.reader import StoreReader
from silo.sync.retention import PointInfo, is_point_due, points_to_drop
from silo.sync.syncer import Syncer

__all__ = ["Caretaker", "OwnerAuthority", "Totals"]

logger = logging.getLogger(__name__)

BUDGET_MIN = 16 * 1024 * 1024
"""Content that a pass may have stored again, however little was sent since the last."""
HOT_BYTES_MAX = 256 * 1024 * 1024
"""Per volume. A whole start of an operating system reads about half of it."""
STEP = 1 << 14


class OwnerAuthority:
    """The owner that serves the group: see `silo.sync.collector.Authority`."""

    def __init__(self, group: Group, syncer: Syncer, may_work: Callable[[], bool]) -> None:
        self.hurry = False
        """Commit what the collector needs at once, rather than with the next cut."""
        self._group = group
        self._syncer = syncer
        self._may_work = may_work

    def may_delete(self) -> bool:
        """Not while the group moves: the target reads a generation that it looked at."""
        return self._may_work()

    @property
    def manifest(self) -> Manifest:
        """The syncer's."""
        return self._syncer.manifest

    def horizon(self) -> Horizon:
        """As of the newest commit."""
        head = self.manifest.head
        return Horizon(head.group, owner_of(head), head.seq, self._syncer.under_way)

    async def raise_floor(self, floor: int, needless_parents: frozenset[str]) -> Head:
        """With the next commit, which is waited for as long as that takes. Raises as `Syncer.sync_now`."""
        amendments = self._syncer.amendments
        amendments.gc_floor = max(amendments.gc_floor, floor)
        amendments.needless_parents |= needless_parents
        while self.manifest.head.gc_floor < floor or needless_parents & set(self.manifest.head.parents):
            await (self._syncer.sync_now() if self.hurry else self._syncer.wait_cycle())
        return self.manifest.head

    async def rewrite(self, keys: frozenset[str]) -> int:
        """Mark the chunks in these segments as dirty, as far as they are on the local disk."""
        self._syncer.retire(keys)
        marked = 0
        if keys:
            for name, volume in self._group.volumes.items():
                chunks = volume.chunks
                slots = self.manifest.volume(name)
                for low in range(0, slots.chunk_count, STEP):
                    found = _chunks_in(slots, keys, low, min(low + STEP, slots.chunk_count))
                    present = found[chunks.view[found] & RESIDENCY_MASK == Residency.PRESENT]
                    chunks.mark_many(present, SYNC_DIRTY)
                    marked += len(present) * volume.geometry.chunk_size
                    await asyncio.sleep(0)
        return marked

    def want_checkpoint(self) -> None:
        """With the next commit."""
        self._syncer.amendments.wants_checkpoint = True


def _chunks_in(volume: VolumeMap, keys: frozenset[str], low: int, high: int) -> Indices:
    slots = volume.slots(low, high)
    paid = np.flatnonzero((slots["kind"] == Kind.RAW) | (slots["kind"] == Kind.ZSTD))
    numbers, inverse = np.unique(slots["segment"][paid], return_inverse=True)
    wanted = np.array([volume.key(int(number)) in keys for number in numbers], dtype=np.bool_)
    return paid[wanted[inverse]] + low if len(paid) else paid


@attrs.define
class Totals:
    """What the collector of a group has done since it was opened. Sizes in bytes."""

    passes: int = 0
    deleted_objects: int = 0
    deleted_bytes: int = 0
    rewritten_bytes: int = 0


class Caretaker:
    """See the module. `run` is the one long call; the others may be made from any task of the loop."""

    def __init__(
        self,
        group: Group,
        syncer: Syncer,
        store: ObjectStore,
        reader: StoreReader,
        clock: Clock,
        *,
        may_work: Callable[[], bool] = lambda: True,
    ) -> None:
        self.error = ""
        """Why the last attempt at something failed; empty when all is well."""
        self.report: PassReport | None = None
        """What the last pass saw."""
        self.totals = Totals()
        self._syncer = syncer
        self._clock = clock
        self._group = group
        self._settings = syncer.settings.collector
        self._policy = syncer.settings.points
        self._may_work = may_work
        self._authority = OwnerAuthority(group, syncer, may_work)
        self._collector = Collector(store, reader, clock, self._authority)
        self._turn = asyncio.Lock()
        self._last_pass = clock.monotonic()
        self._seen = 0
        self._sent = 0
        self._points: list[PointInfo] | None = None
        self._broken = False
        self._hot_at = _when_hot(group, clock, syncer.settings.hot_window_s)

    async def run(self) -> None:
        """Work until cancelled, or until the group is another's."""
        while not self._broken:
            await asyncio.sleep(self._settings.pause_s)
            if not self._may_work():
                continue
            try:
                await self._record_first_reads()
                await self._tend_points()
                if self._settings.is_on and self._is_due():
                    await self.collect()
                self.error = ""
            except (ClosedError, FencedError):
                return
            except SiloError as error:
                self._failed(error)

    def _failed(self, error: SiloError) -> None:
        if str(error) != self.error:
            logger.warning("group %s: its store could not be tidied: %s", self._group_name, error)
        self.error = str(error)
        self._broken = isinstance(error, InvariantError)  # nothing may be deleted any more
        self._last_pass = self._clock.monotonic()

    @property
    def _group_name(self) -> str:
        return self._syncer.manifest.head.group

    # ---- collecting ---------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        since_s = self._clock.monotonic() - self._last_pass
        if since_s >= self._settings.interval_s:
            changed = self._syncer.generation != self._seen
            return changed or (self.report is not None and self.report.dead_objects > 0)
        live = self.report.live_bytes if self.report is not None else 0
        return bool(live) and self._syncer.sent_bytes - self._sent >= max(
            live * self._settings.share, BUDGET_MIN
        )

    async def collect(
        self, *, grace_s: float | None = None, dry_run: bool = False, hurry: bool = False
    ) -> PassReport:
        """One pass now. Raises as `Collector.collect`."""
        async with self._turn:
            generation, sent = self._syncer.generation, self._syncer.sent_bytes
            self._authority.hurry = hurry
            report = await self._collector.collect(
                grace_s=self._settings.grace_s if grace_s is None else grace_s,
                budget=max(BUDGET_MIN, sent - self._sent),
                dry_run=dry_run,
            )
            if not dry_run:
                self.report = report
                self._seen, self._sent = generation, sent
                self._last_pass = self._clock.monotonic()
                self.totals.passes += 1
                self.totals.deleted_objects += report.deleted_objects
                self.totals.deleted_bytes += report.deleted_bytes
                self.totals.rewritten_bytes += report.rewritten_bytes
            return report

    async def fold(self, *, hurry: bool = False) -> None:
        """Have the newest generation name its map by a root alone. A record of it then keeps what it shows, and not all
        that was overwritten since the last root. With the next cut; ``hurry``: now. Raises as `Syncer.sync_now`."""
        self._syncer.amendments.wants_checkpoint = True
        await (self._syncer.sync_now() if hurry else self._syncer.wait_cycle())

    # ---- first reads --------------------------------------------------------------------------------------

    async def _record_first_reads(self) -> None:
        """Once, some minutes after the start."""
        if self._hot_at is None or self._clock.monotonic() < self._hot_at:
            return
        volumes = self._group.volumes
        heats = {name: volume.heat.read_view for name, volume in volumes.items()}
        limits = {name: HOT_BYTES_MAX // volume.geometry.chunk_size for name, volume in volumes.items()}
        chosen = choose_hot(heats, limits)
        hot = self._syncer.manifest.head.hot
        if chosen and (data := encode_hot(chosen)) and (hot is None or digest_of(data).hex() != hot.digest):
            await self._syncer.amend_hot(data)
        self._hot_at = None

    # ---- points -------------------------------------------------------------------------------------------

    async def _tend_points(self) -> None:
        """Make a point when one is due, and drop those that no rule wants any more."""
        if not self._policy.every_s:
            return
        head = self._syncer.manifest.head
        if self._points is None:
            self._points = [_info(point) for point in await self._collector.keeper.points(head.group)]
        if not is_point_due(self._points, self._policy, head.generation, head.cut_time):
            return
        keeper = self._collector.keeper
        await self.fold()
        await keeper.keep_newest(head.group, Keeping.POINT)
        points = await keeper.points(head.group)
        self._points = [_info(point) for point in points]
        doomed = set(points_to_drop(self._points, self._policy))
        await keeper.withdraw(*(point.key for point in points if point.head.generation in doomed))
        self._points = [point for point in self._points if point.generation not in doomed]


def _when_hot(group: Group, clock: Clock, window_s: float) -> float | None:
    """When to look which chunks were read. Never for a group that has come with its heat: it was not started here."""
    if not window_s or any(bool(volume.heat.read_view.any()) for volume in group.volumes.values()):
        return None
    return clock.monotonic() + window_s


def _info(record: Record) -> PointInfo:
    return PointInfo(record.head.generation, record.head.cut_time, record.kept.label)
