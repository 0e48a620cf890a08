"""A group as a host has it open: its volumes, its link to the store, its exports and its workload.

Made by `silo.host.Host`: `open_group`, or the acceptance of one that arrives. What it offers to callers is what
can be asked of one group; the parts behind it know nothing of one another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

import numpy as np

from silo.abc import Role
from silo.chunkmap import RESIDENCY_MASK, SYNC_DIRTY, SYNC_IN_CUT, Residency
from silo.errors import (
    ClosedError,
    FencedError,
    InvalidRequestError,
    MigrationAborted,
    SiloError,
    UnavailableError,
)
from silo.events import MigrationReport
from silo.exporting import Exporter
from silo.group import Group
from silo.hooks.observers import Observer
from silo.hooks.runner import WorkloadRunner
from silo.hydrator import Hydrator
from silo.moving import EventLog, Move
from silo.opening import remember_generation, remember_taken
from silo.p2p.handover import SourceState
from silo.p2p.ports import Plugs, Site
from silo.p2p.records import OFFER_RECORD
from silo.p2p.settings import MigrationPolicy
from silo.p2p.source import SourceMigration
from silo.p2p.target import TargetMigration
from silo.statedir import GroupState
from silo.storelink import StoreLink
from silo.volume import Volume

__all__ = ["HostedGroup"]

logger = logging.getLogger(__name__)

START_DELAY_MIN_S = 0.2
START_DELAY_MAX_S = 10.0
ARRIVAL_PATIENCE_S = 30.0
"""What closing gives a migration to here: a host that was told to stop is often about to vanish."""
COURTESY_S = 2.0
"""And to telling a source, which may be gone for ever, that it is not needed any more."""

ABSENT = (Residency.ABSENT_STORE, Residency.ABSENT_PEER)


class HostedGroup:
    """See the module. All calls may be made concurrently, from tasks of the host's event loop."""

    def __init__(
        self,
        group: Group,
        state: GroupState,
        link: StoreLink | None,
        runner: WorkloadRunner,
        exporter: Exporter,
        site: Site,
        tasks: asyncio.TaskGroup,
        on_closed: Callable[[str], object],
    ) -> None:
        self.group = group
        self.state = state
        self.link = link
        self.runner = runner
        self.phase = "opening"
        """What the group is doing here, in a word, for people."""
        self.hydrator = Hydrator(group, site.clock)
        self.move: Move | None = None
        """The migration away from here, the latest one."""
        self.arrival: EventLog | None = None
        """The events of the migration to here."""
        self._migration: TargetMigration | None = None
        self._arriving: asyncio.Task[None] | None = None
        self._exporter = exporter
        self._site = site
        self._clock = site.clock
        self._tasks = tasks
        self._on_closed = on_closed
        self._background: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Lock()
        self._forgets = False
        self._hydrating: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._trouble: SiloError | None = None

    @property
    def name(self) -> str:
        """The group's name."""
        return self.group.name

    @property
    def volumes(self) -> dict[str, Volume]:
        """The volumes by name."""
        return self.group.volumes

    @property
    def is_hydrated(self) -> bool:
        """Nothing is absent any more: neither store nor peer is needed to serve reads."""
        return not self.group.absent_counts(ABSENT)

    async def start(self) -> None:
        """Begin to sync and to hydrate. The group was claimed."""
        if self.link is not None:
            self.link.may_tidy = lambda: self.phase == "running"
            await self.link.start(self.group, self._tasks)
        self._hydrate()
        self._settle("running")

    def _hydrate(self) -> None:
        """Once, however often the group is started."""
        if self._hydrating is not None:
            return
        if self.link is not None:
            self.link.fill_known_zeros(self.group)
            self.hydrator.first_reads = self.link.first_reads
        self._hydrating = self._spawn(self.hydrator.run())

    def _settle(self, phase: str, error: SiloError | None = None) -> None:
        """Whoever waits for the group to run learns how that ended."""
        self.phase = phase
        self._trouble = error
        self._settled.set()

    async def wait_running(self) -> None:
        """Return when the group runs here. `MigrationAborted` when it did not arrive, whatever else kept it away.

        `ClosedError` when it was closed before. No deadline: for a group that arrives the source decides when.
        """
        await self._settled.wait()
        if self._trouble is not None:
            raise self._trouble

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # ---- the store ----------------------------------------------------------------------------------------

    async def sync_now(self) -> int:
        """Store everything that is dirty, and return the generation that holds it. Brings no deadline of its own.

        `InvalidRequestError` without a store, `FencedError` when another host owns the group.
        """
        if self.link is None or self.link.syncer is None:
            raise InvalidRequestError(f"group {self.name} has no store", hint="open it with a store")
        return await self.link.syncer.sync_now()

    async def wait_stored(self) -> int:
        """Return when everything acknowledged before this call is stored, without hurrying. As `sync_now`."""
        if self.link is None or self.link.syncer is None:
            raise InvalidRequestError(f"group {self.name} has no store", hint="open it with a store")
        return await self.link.syncer.wait_stored()

    async def wait_hydrated(self) -> None:
        """Return when nothing is needed from elsewhere any more: the group may itself migrate now.

        No deadline: it takes what store and peer need. `MigrationAborted` when the group does not arrive.
        """
        await self.wait_running()
        await self.hydrator.wait_done()
        if self._migration is not None:
            await self._migration.wait_evacuated()

    # ---- moving -------------------------------------------------------------------------------------------

    def migrate(
        self,
        to: str,
        *,
        deadline: float | None = None,
        policy: MigrationPolicy | None = None,
        observers: Sequence[Observer] = (),
    ) -> Move:
        """Move the group to the host that listens at ``to``: ``tcp:host:port`` or ``unix:/path``.

        Use as ``async with group.migrate(...) as move``. ``deadline`` is `Clock.monotonic` time: a switchover that is
        not done by then is given up. ``observers`` get every event, and may object until the guest is stopped.
        `InvalidRequestError` when the group is moving already, or is not running here.
        """
        if self.phase != "running":
            raise InvalidRequestError(
                f"group {self.name} cannot move now: it is {self.phase}", hint="see `silo status`"
            )
        log = EventLog(self.name, self._clock, observers)
        migration = SourceMigration(
            self.group,
            to,
            self._site,
            self._plugs(Role.SOURCE, log, deadline),
            deadline=deadline,
            policy=policy,
        )
        self.move = Move(log, lambda: self._leave(migration), self._tasks.create_task)
        return self.move

    def _plugs(self, role: Role, log: EventLog, deadline: float | None = None) -> Plugs:
        runner = self.runner.for_migration(role, deadline=math.inf if deadline is None else deadline)
        return Plugs(
            records=self.state,
            guest=runner,
            ownership=self.link,
            emit=log.emit,
            consent=log.consent,
            bytes_store=lambda: self.link.fetched_bytes if self.link else 0,
        )

    def continue_leaving(self, record: bytes) -> None:
        """After a restart: a migration away from here was past its offer."""
        log = EventLog(self.name, self._clock)
        migration = SourceMigration.restore(self.group, record, self._site, self._plugs(Role.SOURCE, log))
        self.move = Move(log, lambda: self._leave(migration), self._tasks.create_task)
        self.move.begin()

    async def _leave(self, migration: SourceMigration) -> MigrationReport:
        """One migration away from here, until this host is not needed any more, or the group is back."""
        self.phase = "moving away"
        try:
            report = await migration.run()
        except asyncio.CancelledError:
            # Undone when that was possible; else it goes on after the next start of the host.
            if migration.state is SourceState.ABORTED:
                self.phase = "running"
            raise
        except SiloError as error:
            if migration.state is SourceState.ABORTED:
                await self._start_patiently()
            else:
                self._settle("fenced" if isinstance(error, FencedError) else "in doubt", error)
            raise
        self._settle("moved away", MigrationAborted(f"group {self.name} has moved to another host"))
        await self.close(forget=True)
        return report

    def arrive(self, begin: Callable[[Plugs], TargetMigration]) -> None:
        """Take part in a migration to here, which ``begin`` makes from what the group plugs in."""
        self.arrival = log = EventLog(self.name, self._clock)
        self._migration = begin(self._plugs(Role.TARGET, log))
        if not self._migration.is_evacuated:
            self.phase = "arriving"
        self._arriving = self._spawn(self._take_in(self._migration, log))

    async def _take_in(self, migration: TargetMigration, log: EventLog) -> None:
        """One migration to here. Its failure is told to whoever waits for the group, not raised."""
        try:
            async with asyncio.TaskGroup() as tasks:
                follow = tasks.create_task(self._follow(migration))
                try:
                    await migration.run()
                except MigrationAborted as error:
                    follow.cancel()
                    self._settle("not arrived", error)
                except SiloError as error:
                    # It is ours, and nothing is missing: a record is left, which the next start finds.
                    logger.warning("group %s: its migration did not end in order: %s", self.name, error)
        finally:
            await log.end()
        if self.phase == "not arrived":
            self._background.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            await self.close(forget=True)

    async def _follow(self, migration: TargetMigration) -> None:
        """Do for an arriving group what each of its steps allows."""
        if self.phase == "running":
            return  # evacuated before a restart: only its source has not heard of it
        await migration.wait_running()
        self._settle("running, not evacuated")
        await self._start_patiently("running, not evacuated")
        await migration.wait_evacuated()
        self.phase = "running"

    async def _start_patiently(self, phase: str = "running") -> None:
        """As `start`, repeated until the store answers: the guest runs already, and must not wait for it."""
        delay_s = START_DELAY_MIN_S
        while True:
            try:
                await remember_taken(self.group, self.state, self.link)
                await self.start()
            except SiloError as error:
                if not isinstance(error, UnavailableError):
                    logger.warning("group %s is not kept in its store yet: %s", self.name, error)
                self.hydrator.error = str(error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, START_DELAY_MAX_S)
            else:
                self.phase = phase
                return

    # ---- seeing -------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything that can be seen of the group, as plain values; sizes in bytes. Reads every map once."""
        sync = self.link.status if self.link is not None else None
        return {
            "name": self.name,
            "state": self._seen_phase,
            "epoch": sync.epoch if sync else None,
            "hydrated": self.is_hydrated,
            "hydration_error": self.hydrator.error,
            "exposed_bytes": self.group.exposed_bytes,
            "migration": self.move.phase.value if self.move and self.move.phase else None,
            "bytes_store": self.link.fetched_bytes if self.link else 0,
            "volumes": [self._volume_status(volume) for volume in self.volumes.values()],
            "sync": sync
            and {
                "phase": sync.phase.value,
                "generation": sync.generation,
                "cut_time": sync.cut_time,
                "rpo_s": sync.rpo_s if sync.generation else None,
                "holds": list(sync.holds),
                "last_error": sync.error,
                "attempts": sync.attempts,
                "cuts": sync.cuts,
                "abandoned_cuts": sync.abandoned_cuts,
                "sent_bytes": sync.sent_bytes,
                "sent_objects": sync.sent_objects,
            },
        }

    @property
    def _seen_phase(self) -> str:
        """The phase, or what keeps the guest from its disks meanwhile."""
        gate = self.group.gate
        if isinstance(gate.error, FencedError):
            return "fenced"
        return self.phase if gate.is_open or gate.is_closed or gate.error else "waiting for its lease"

    def _volume_status(self, volume: Volume) -> dict[str, Any]:
        counts = volume.chunks.count_residency()
        chunk_size = volume.geometry.chunk_size
        return {
            "name": volume.name,
            "size": volume.geometry.size,
            "chunk_size": chunk_size,
            "read_only": volume.read_only,
            "present": counts[Residency.PRESENT] * chunk_size,
            "zero": (counts[Residency.ZERO] + counts[Residency.ZERO_UNPUNCHED]) * chunk_size,
            "absent_store": counts[Residency.ABSENT_STORE] * chunk_size,
            "absent_peer": counts[Residency.ABSENT_PEER] * chunk_size,
            "dirty": volume.chunks.count_dirty(SYNC_DIRTY | SYNC_IN_CUT) * chunk_size,
            "uris": self._exporter.uris(self.name, volume.name),
        }

    def heat(self, cells: int) -> list[dict[str, Any]]:
        """The heat of each volume in at most ``cells`` runs of chunks, relative to the hottest of them."""
        return [_heat_of(volume, cells) for volume in self.volumes.values()]

    # ---- the end ------------------------------------------------------------------------------------------

    async def make_way(self, source_host: str) -> None:
        """A host offers this group anew: if it is arriving from there and has not been claimed, its source has given
        that attempt up, perhaps unheard, and so do we. Bounded: otherwise, or past that, nothing changes."""
        task, migration = self._arriving, self._migration
        if task is not None and migration is not None and migration.source_host == source_host:
            migration.abort("its source began anew")
            if self.phase == "arriving":
                await asyncio.wait((task,), timeout=COURTESY_S)

    async def _finish_arriving(self) -> None:
        """Before closing in peace: an arrival that has not claimed is given up, and one that has is let end, so that
        the source is not left waiting. Bounded: past that it goes on after the next start."""
        task = self._arriving
        if task is not None and self._migration is not None and task is not asyncio.current_task():
            self._migration.abort("the host was told to stop")
            with contextlib.suppress(TimeoutError, MigrationAborted):
                async with asyncio.timeout(ARRIVAL_PATIENCE_S):
                    await self._migration.wait_evacuated()
            await asyncio.wait((task,), timeout=COURTESY_S)

    async def close(self, *, drain: bool = True, forget: bool = False) -> None:
        """Stop serving; store what is not stored (unless told not to); make the rest durable here.

        ``forget``: the group has moved away for good, so nothing is stored, and nothing is remembered of it.

        `UnavailableError` with the number of exposed bytes when the store could not be brought up to date;
        everything is closed all the same, and the local disk has it. Twice is harmless; a call that was cancelled
        leaves the rest to the next.
        """
        self._forgets |= forget
        if drain and not forget:
            await self._finish_arriving()
        async with self._closing:
            if self.phase != "closed":
                # Between claim and evacuation nothing may be committed; what is here goes on after the next start.
                drain = drain and self.phase == "running"
                self.phase = "closing"
                await self._close(drain=drain)

    async def _close(self, *, drain: bool) -> None:
        errors: list[SiloError] = []
        for task in list(self._background):
            task.cancel()
        if self._background:
            await asyncio.wait(self._background)
        await self._exporter.remove(self.name)
        await self.group.gate.close_and_drain()
        lost = self._forgets or self.group.gate.error is not None
        if self.link is not None:
            await _collect(errors, self.link.close(drain=drain and not lost))
        if self._forgets:
            await _collect(errors, self.state.forget(last=OFFER_RECORD))
        elif not lost:
            await _collect(errors, self.group.checkpoint())
            await _collect(errors, remember_generation(self.state, self.link))
        self.group.gate.fail(ClosedError(f"group {self.name} was closed"))
        await _collect(errors, self.group.aclose())
        await _collect(errors, self.state.aclose())
        self.phase = "closed"
        self.hydrator.close()
        if not self._settled.is_set():
            self._settle("closed", ClosedError(f"group {self.name} was closed"))
        self._on_closed(self.name)
        if errors:
            raise errors[0]


async def _collect(errors: list[SiloError], step: Awaitable[None]) -> None:
    """One step of closing: an error is remembered, and the next step is taken all the same."""
    try:
        await step
    except SiloError as error:
        errors.append(error)


def _heat_of(volume: Volume, cells: int) -> dict[str, Any]:
    count = volume.chunks.count
    per_cell = -(-count // max(1, cells))
    starts = np.arange(0, count, per_cell)
    reads = np.add.reduceat(volume.heat.read_heat(), starts)
    writes = np.add.reduceat(volume.heat.write_heat(), starts)
    commonest = [
        Residency(
            int(np.bincount(volume.chunks.view[start : start + per_cell] & RESIDENCY_MASK).argmax())
        ).name
        for start in starts.tolist()
    ]
    return {
        "name": volume.name,
        "chunk_size": volume.geometry.chunk_size,
        "chunks_per_cell": per_cell,
        "reads": (reads / max(float(reads.max()), 1e-9)).round(4).tolist(),
        "writes": (writes / max(float(writes.max()), 1e-9)).round(4).tolist(),
        "residency": commonest,
    }
