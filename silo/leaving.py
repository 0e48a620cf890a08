"""Leaving a host without another one: a group is stopped and goes to the store, whole, with its workload's state.

*Hibernation* and the evacuation of a migration that finds no target in time are the same path on purpose, so that the
one that is used in need is used every day::

    upload while the guest runs ──► quiesce, suspend, flush, capture ──► gate closed ──► last cut, and the state
        ──► head: released, with the state ──► closed here

Up to the last arrow but one everything can be undone: the gate opens again and the guest runs on. Releasing the head
cannot: from the moment in which that may have been sent any host may resume the group, so the guest stays stopped and
the release is repeated until the store has answered. A host that dies before owns the group as if nothing had
been; one that dies after has nothing that anybody needs. Each step may be repeated, by a second hibernation.

Safety rule 14: the state is valid for the generation that was cut behind the closed gate, and it is named by the same
change of the head that lets go of the group; whatever is committed later does not name it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Never

import attrs

from silo.chunkmap import Residency
from silo.errors import InvalidRequestError, MigrationAborted, SiloError, UnavailableError
from silo.events import MigrationReport, Outcome, Phase, Progress
from silo.group import Group
from silo.p2p.ports import Plugs, Site
from silo.p2p.settings import MigrationPolicy
from silo.p2p.source_copy import store_while_running
from silo.p2p.steering import Steering
from silo.p2p.watch import Watch
from silo.storelink import StoreLink
from silo.sync.head import PartRef
from silo.tasks import task_group

__all__ = ["Hibernation", "joined"]

UNSUSPEND_DELAY_MAX_S = 5.0


class Hibernation:
    """See the module. Runs once. ``release`` closes the group here, naming the saved state in the head."""

    def __init__(
        self,
        group: Group,
        link: StoreLink,
        site: Site,
        plugs: Plugs,
        *,
        deadline: float | None,
        policy: MigrationPolicy | None,
        release: Callable[[PartRef], Awaitable[None]],
    ) -> None:
        self.is_over = False
        """It cannot be undone any more."""
        self._group = group
        self._link = link
        self._site = site
        self._guest = plugs.guest
        self._watch = Watch(group.name, site.clock, plugs.emit, plugs.consent)
        self._steering = Steering(
            group, site.clock, site.settings, policy or MigrationPolicy(), self._watch,
            deadline=deadline, uploaded=link.uploaded,
        )  # fmt: skip
        self._release = release
        self._stops_guest = False
        self._uploaded_before, _ = link.uploaded()
        self._stored = 0
        self._reason = ""
        self._workload_s: float | None = None

    async def run(self) -> MigrationReport:
        """Bring the group to the store. Returns when nothing here is needed any more.

        `MigrationAborted` when the group stays, and its guest runs here as before. `FencedError` when another host has
        taken it. Cancelled before the release it is undone first; cancelled later the guest stays stopped.
        """
        async with task_group() as tasks:
            progress = tasks.create_task(self._tell_progress())
            try:
                part = await self._undoable()
                self.is_over = True
                self._count()
                self._watch.enter(Phase.EVACUATED)
                await self._release(part)
            finally:
                progress.cancel()
                self._steering.release()
        self._watch.enter(Phase.ENDED)
        return self.report

    async def _undoable(self) -> PartRef:
        try:
            return await self._store()
        except asyncio.CancelledError:
            await self._undo("it was told to stop")
            raise
        except SiloError as error:
            await self._undo(str(error))
            raise MigrationAborted(
                f"group {self._group.name} stays on this host: {error.message}", hint=error.hint
            ) from error

    async def _store(self) -> PartRef:
        self._watch.enter(Phase.STORING)
        if self._group.absent_counts((Residency.ABSENT_PEER,)):
            raise InvalidRequestError(
                f"group {self._group.name} still needs chunks of the host that it came from",
                hint="wait until it is evacuated",
            )
        settings = self._site.settings
        await store_while_running(self._link, self._steering, self._group, settings.look_s, self._site.clock)
        await self._watch.ask(Phase.SWITCHOVER)
        state = await self._stop_guest()
        self._steering.release()
        left_s = self._steering.left_s
        try:
            async with asyncio.timeout(settings.patience_s if left_s is None else max(0.0, left_s)):
                await self._link.store_all()
                return await self._link.save_state(state)
        except TimeoutError as error:
            raise UnavailableError(
                f"{self._group.exposed_bytes} bytes were not stored in time",
                hint="see `silo status` for what is wrong with the store",
            ) from error

    async def _stop_guest(self) -> bytes:
        guest, before = self._guest, self._guest.spent_s
        self._stops_guest = True
        await guest.quiesce()
        await guest.suspend()
        await guest.flush()
        state = await guest.capture()
        self._workload_s = guest.spent_s - before
        await self._group.gate.close_and_drain()
        await self._group.flush()
        return state

    async def _undo(self, reason: str) -> None:
        """The guest runs on here. Its hooks are called until they succeed: it must not stand still for ever."""
        self._reason = reason
        self._count()
        self._group.gate.reopen()
        delay_s = self._site.settings.retry_min_s
        while self._stops_guest:
            try:
                await self._guest.unsuspend()
                await self._guest.unquiesce()
                break
            except SiloError:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, UNSUSPEND_DELAY_MAX_S)
        self._watch.enter(Phase.ENDED, reason)

    # ---- seeing -------------------------------------------------------------------------------------------

    def _count(self) -> None:
        self._stored = max(self._stored, self._link.uploaded()[0] - self._uploaded_before)

    async def _tell_progress(self) -> Never:
        while True:
            await asyncio.sleep(self._site.settings.progress_s)
            if self._watch.phase in (Phase.STORING, Phase.SWITCHOVER):
                self._count()
                exposed, rate = self._group.exposed_bytes, self._steering.store.rate_bps or 0.0
                self._watch.tell(
                    Progress,
                    phase=self._watch.phase,
                    bytes_peer=0,
                    bytes_stored=self._stored,
                    rate_bps=rate,
                    exposed_bytes=exposed,
                    remaining_bytes=exposed,
                    eta_s=exposed / rate if rate else None,
                )

    @property
    def report(self) -> MigrationReport:
        """What it has come to so far; final once `run` has ended."""
        phases = self._watch.timings
        return MigrationReport(
            group=self._group.name,
            migration="",
            outcome=Outcome.STORED if self.is_over else Outcome.ABORTED if self._reason else None,
            reason=self._reason,
            phases=phases,
            duration_s=sum(timing.duration_s for timing in phases),
            bytes_stored=self._stored,
            workload_ms=None if self._workload_s is None else self._workload_s * 1e3,
            evacuated_ms=sum(t.duration_s for t in phases if t.phase is not Phase.EVACUATED) * 1e3
            if self.is_over
            else None,
        )


def joined(first: MigrationReport, second: MigrationReport) -> MigrationReport:
    """The report of a migration that came to nothing and went on as an evacuation to the store."""
    phases = first.phases + second.phases
    evacuated_ms = None if second.evacuated_ms is None else second.evacuated_ms + first.duration_s * 1e3
    return attrs.evolve(
        second,
        migration=first.migration,
        reason=first.reason if second.outcome is Outcome.STORED else second.reason,
        phases=phases,
        duration_s=sum(timing.duration_s for timing in phases),
        rounds=first.rounds,
        bytes_peer=first.bytes_peer,
        evacuated_ms=evacuated_ms,
    )
