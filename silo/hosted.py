"""A group as a host has it open: its volumes, its link to the store, its exports and its workload.

Made by `silo.host.Host`: `open_group`, or the acceptance of one that arrives. What it offers to callers is what
can be asked of one group; the parts behind it know nothing of one another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, cast

from silo.abc import Role
from silo.chunkmap import Residency
from silo.errors import (
    ClosedError,
    FencedError,
    InvalidRequestError,
    InvariantError,
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
from silo.importing import Import
from silo.leaving import Hibernation, joined
from silo.moving import EventLog, Move
from silo.opening import remember_generation, remember_taken
from silo.p2p.handover import SourceState
from silo.p2p.ports import Plugs, Site
from silo.p2p.records import OFFER_RECORD
from silo.p2p.settings import MigrationPolicy
from silo.p2p.source import SourceMigration
from silo.p2p.target import TargetMigration
from silo.resuming import Resumption, end_resumption
from silo.seeing import group_status, heat_of
from silo.statedir import GroupState
from silo.storelink import StoreLink
from silo.sync.head import PartRef
from silo.tasks import collect
from silo.volume import Volume

__all__ = ["HostedGroup"]

logger = logging.getLogger(__name__)

START_DELAY_MIN_S = 0.2
START_DELAY_MAX_S = 10.0
ARRIVAL_PATIENCE_S = 30.0
"""What closing gives a migration to here: a host that was told to stop is often about to vanish."""
GIVE_BACK_S = 20.0
"""To saying in the store that a resumption has failed."""
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
        self.waking: Resumption | None = None
        """It was hibernated, and its workload does not run yet."""
        self.importing: Import | None = None
        """What brings its volumes in from another server, or did. Set before `start`."""
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
        if self.importing is not None:
            _ = self._spawn(self.importing.run(lambda: self._settle("running")))
        self._settle("running" if self.importing is None else "importing")

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
        if self.importing is not None:
            await self.importing.wait_done()
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

        Use as ``async with group.migrate(...) as move``. ``deadline`` is `Clock.monotonic` time: when this host goes
        away. Nothing shall be needed from here by then (`silo.p2p.budget`), and without a target in time the group goes
        to the store, unless ``policy`` says otherwise. ``observers`` get every event, and may object until the guest
        is stopped. `InvalidRequestError` when the group is moving already, or is not running here.
        """
        self._check_may_leave()
        log = EventLog(self.name, self._clock, observers)
        migration = SourceMigration(
            self.group, to, self._site, self._plugs(Role.SOURCE, log, deadline), deadline=deadline, policy=policy
        )  # fmt: skip
        evacuation = None
        if self.link is not None and (policy or MigrationPolicy()).evacuate:
            evacuation = partial(self._hibernation, self.link, log, policy=policy)
        self.move = Move(
            log, lambda: self._leave(migration, log, evacuation), self._tasks.create_task, migration.switch
        )
        return self.move

    def hibernate(
        self,
        *,
        deadline: float | None = None,
        policy: MigrationPolicy | None = None,
        observers: Sequence[Observer] = (),
    ) -> Move:
        """Stop the group and leave it in the store, with the state of its workload: `silo.leaving`.

        Use as `migrate`; `Move.wait_released` returns when the group is whole in the store. Any host may resume it
        (`silo.Host.resume_group`). ``deadline`` as in `migrate`; what is not stored by then stays here, and its guest
        runs on. `InvalidRequestError` without a store, or when the group is not running here.
        """
        self._check_may_leave()
        if self.link is None:
            raise InvalidRequestError(f"group {self.name} has no store", hint="open it with a store")
        log = EventLog(self.name, self._clock, observers)
        hibernation = self._hibernation(self.link, log, deadline=deadline, policy=policy)
        self.move = Move(log, lambda: self._hibernate(hibernation), self._tasks.create_task)
        return self.move

    def _check_may_leave(self) -> None:
        if self.link is None and self._arriving is not None and not self._arriving.done():
            # Without a store only our record keeps the former host from taking itself for the owner again.
            raise InvalidRequestError(
                f"group {self.name} cannot move now: the host that it came from has not heard yet that it arrived",
                hint="start that host, or open the group with a store",
            )
        if self.phase != "running":
            why = f"it is {self.phase}"
            if self.phase == "running, not evacuated":
                why = "the host that it came from still has chunks that are nowhere else"
            raise InvalidRequestError(
                f"group {self.name} cannot move now: {why}", hint="see `silo status`, and try again later"
            )

    def _hibernation(
        self, link: StoreLink, log: EventLog, *, deadline: float | None, policy: MigrationPolicy | None
    ) -> Hibernation:
        return Hibernation(
            self.group, link, self._site, self._plugs(Role.SOURCE, log, deadline), deadline=deadline, policy=policy,
            release=lambda part: self.close(resume=part),
        )  # fmt: skip

    async def _hibernate(self, hibernation: Hibernation) -> MigrationReport:
        """To the store, until this host is not needed any more, or the group runs on."""
        self.phase = "hibernating"
        try:
            return await hibernation.run()
        finally:
            if not hibernation.is_over:
                self.phase = "running"

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
        self.move = Move(log, lambda: self._leave(migration, log), self._tasks.create_task)
        self.move.begin()

    async def _leave(
        self,
        migration: SourceMigration,
        log: EventLog,
        evacuation: Callable[..., Hibernation] | None = None,
    ) -> MigrationReport:
        """One migration away from here, until this host is not needed any more, or the group is back; or, when it came
        to nothing and nobody wanted that, an ``evacuation``."""
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
                is_mistake = isinstance(error.__cause__, InvalidRequestError)
                wanted = migration.deadline is not None and not (is_mistake or log.has_objections)
                if evacuation is not None and wanted:
                    return joined(
                        migration.report, await self._hibernate(evacuation(deadline=migration.deadline))
                    )
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
                except FencedError as error:
                    follow.cancel()
                    self._settle("fenced", error)
                    logger.warning("%s", error)
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

    # ---- waking -------------------------------------------------------------------------------------------

    async def wake(self) -> None:
        """After the opening of a hibernated group: let its workload go on, and commits begin. See `silo.resuming`."""
        if self.waking is None or self.link is None:
            raise InvariantError(f"group {self.name} was to be woken, and has no state to wake from")
        await self.waking.wake(self.group, self.runner.for_migration(Role.TARGET))
        self.waking = None
        await end_resumption(self.state, self.link)

    async def give_back(self) -> None:
        """Undo a resumption that failed: the group is hibernated as before. Nothing to do when it has succeeded after
        all. Without the store, or while the workload may yet run, the group stays ours, to be resumed here again."""
        if self.waking is None:
            return
        try:
            await self.runner.for_migration(Role.TARGET).fence()
            async with asyncio.timeout(GIVE_BACK_S):
                await self.close(drain=False, resume=self.waking.part)
        except (SiloError, TimeoutError) as error:
            logger.warning("group %s could not be given back: %s", self.name, error)
            await self.close(drain=False)

    def tick(self) -> None:
        """Called by the host once a second."""
        self.group.advance_heat()
        if self.link is not None and self.link.syncer is not None:
            self.link.syncer.look()

    # ---- seeing -------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything that can be seen of the group, as plain values; sizes in bytes. Reads every map once."""
        moving = self.move.phase if self.move else None
        seen = group_status(self.group, self.phase, moving, self.link, self.hydrator, self._exporter)
        return seen | {"importing": self.importing.status() if self.importing else None}

    def heat(self, cells: int) -> list[dict[str, Any]]:
        """The heat of each volume in at most ``cells`` runs of chunks, relative to the hottest of them."""
        return [heat_of(volume, cells) for volume in self.volumes.values()]

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

    async def close(self, *, drain: bool = True, forget: bool = False, resume: PartRef | None = None) -> None:
        """Stop serving; store what is not stored (unless told not to); make the rest durable here.

        ``forget``: the group has moved away for good, so nothing is stored, and nothing is remembered of it.
        ``resume``: it hibernates, with this state of its workload.

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
                drain = drain and self.phase in ("running", "hibernating")
                self.phase = "closing"
                await self._close(drain=drain, resume=resume)

    async def _close(self, *, drain: bool, resume: PartRef | None) -> None:
        errors: list[SiloError] = []
        for task in list(self._background):
            task.cancel()
        if self._background:
            await asyncio.wait(self._background)
        await self._exporter.remove(self.name)
        await self.group.gate.close_and_drain()
        lost = self._forgets or self.group.gate.error is not None
        if self.link is not None:
            await collect(errors, self.link.close(drain=drain and not lost, resume=resume))
        if self._forgets or (resume is not None and not errors):
            await collect(errors, self.state.forget(last=OFFER_RECORD))
        elif not lost:
            await collect(errors, self.group.checkpoint())
            await collect(errors, remember_generation(self.state, self.link))
        self.group.gate.fail(ClosedError(f"group {self.name} was closed"))
        await collect(errors, self.group.aclose())
        await collect(errors, self.state.aclose())
        self.phase = "closed"
        self.hydrator.close()
        if not self._settled.is_set():
            self._settle("closed", ClosedError(f"group {self.name} was closed"))
        self._on_closed(self.name)
        if errors:
            raise errors[0]
