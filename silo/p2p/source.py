"""The source of a migration: a group leaves this host.

`SourceMigration.run` is the whole life of one migration on this side, from the first dial to *released* or
*aborted*. What may happen when is in the tables of `silo.p2p.handover`, what is done then in
`silo.p2p.source_effects`; what happens to chunks is in `silo.p2p.rounds` and `silo.p2p.pusher`, and what is said
on the link in `silo.p2p.source_session`. This module puts them together.

After a restart of the process a migration goes on from its offer record (`SourceMigration.restore`): the arbiter is
asked first, and if the target has the group, this side serves chunks until it is released.
"""

from __future__ import annotations

import asyncio

from silo.errors import FencedError, InvalidRequestError, MigrationAborted
from silo.events import MigrationReport, Phase
from silo.group import Group
from silo.p2p.driver import Driver
from silo.p2p.handover import SOURCE, Event, Machine, SourceState
from silo.p2p.messages import Evacuated, Stage, Taken
from silo.p2p.ports import Plugs, Site
from silo.p2p.pusher import Pusher
from silo.p2p.records import OfferRecord, decode_offer_record
from silo.p2p.rounds import Rounds
from silo.p2p.settings import MigrationPolicy
from silo.p2p.source_copy import SourceParts
from silo.p2p.source_effects import SourceEffects
from silo.p2p.source_link import SourceLink
from silo.p2p.source_report import SourceReport
from silo.p2p.source_session import SourceSession
from silo.p2p.steering import Steering
from silo.p2p.watch import Watch
from silo.p2p.wire import MIGRATION_ID_SIZE
from silo.tasks import task_group

__all__ = ["SourceMigration"]

_BEFORE_HANDOVER = frozenset({SourceState.COPYING, SourceState.OFFERING, SourceState.SUSPENDING})


class SourceMigration:
    """See the module. Runs once; one at a time per group."""

    def __init__(
        self,
        group: Group,
        url: str,
        site: Site,
        plugs: Plugs,
        *,
        deadline: float | None = None,
        policy: MigrationPolicy | None = None,
        offer: OfferRecord | None = None,
    ) -> None:
        """Move ``group`` to the host that listens at ``url``.

        ``deadline`` is the `Clock.monotonic` time by which nothing should need this host any more. ``offer`` is for
        `restore`. `InvalidRequestError` when the policy asks for a store and there is none.
        """
        policy = policy or MigrationPolicy()
        if policy.durable_before_switch and plugs.ownership is None:
            raise InvalidRequestError(
                f"group {group.name} has no store that could have everything before the switchover",
                hint="open it with a store, or leave durable_before_switch out",
            )
        clock, settings = site.clock, site.settings
        self.group = group
        self.id = offer.migration if offer else clock.token(MIGRATION_ID_SIZE)
        self._guest = plugs.guest
        self._watch = watch = Watch(group.name, clock, plugs.emit, plugs.consent)
        machine = Machine(SOURCE, SOURCE.restart[offer.mark] if offer else None)
        self._driver = driver = Driver(machine, clock, settings, watch)
        names = [volume.name for volume in offer.volumes] if offer else list(group.volumes)
        rounds = Rounds(group, names, has_store=plugs.ownership is not None)
        pusher = Pusher(rounds, self.id, clock, settings, driver.changed)
        session = SourceSession(
            site.host, group.name, self.id, rounds, pusher, watch, driver.post, self._note
        )
        if offer is not None:
            session.stage, session.target_host = Stage.HANDED, offer.target_host
            pusher.is_frozen = True
        self._link = SourceLink(url, site, session, pusher, driver.changed)
        self._report = SourceReport(self.id, watch, clock, rounds, pusher, settings.progress_s)
        self._steering = Steering(
            group, clock, settings, policy, watch, deadline=deadline,
            uploaded=plugs.ownership.uploaded if plugs.ownership else None,
        )  # fmt: skip
        self._effects = SourceEffects(
            SourceParts(
                self.id, group, url, site, plugs, self._steering, watch, driver, rounds, pusher, session,
                self._link, self._report, offer,
            )
        )  # fmt: skip
        driver.set_effects(self._effects.table())

    @classmethod
    def restore(cls, group: Group, record: bytes, site: Site, plugs: Plugs) -> SourceMigration:
        """Go on after a restart, from the content of the offer record.

        The group's gate must be closed, its maps and devices as they were left. `CorruptionError` when the record
        cannot be read.
        """
        offer = decode_offer_record(record)
        return cls(group, offer.target_url, site, plugs, offer=offer)

    def _note(self, message: Taken | Evacuated) -> None:
        if isinstance(message, Taken):
            self._report.taken(message, self._guest.spent_s)
        else:
            self._report.evacuated(message)

    @property
    def state(self) -> SourceState:
        """Where it stands."""
        return self._driver.machine.state

    @property
    def report(self) -> MigrationReport:
        """What it has come to so far; final once `run` has ended."""
        return self._report.make(self.state, self._driver.reason)

    @property
    def deadline(self) -> float | None:
        """When this host goes away, as far as the migration was told."""
        return self._steering.budget.deadline

    def switch(self, deadline: float | None) -> None:
        """Follow no longer, and let the target take over. Harmless when it does not follow."""
        self._steering.switch(deadline)
        self._driver.changed.notify()

    def abort(self, reason: str) -> None:
        """Stop it, if the group can still stay; `run` then ends with `MigrationAborted`.

        Before the handover that is certain. Afterwards the arbiter decides, and without a store the target.
        Once the target has the group nothing happens.
        """
        self._driver.post(Event.FAILED, MigrationAborted(reason))

    def assert_target_dead(self) -> None:
        """Somebody vouches that the target is gone for ever and has never run the guest, and will not.

        Counts only for a group without a store, whose handover is in doubt: with a store the register knows.
        A false assertion forks the group.
        """
        self._effects.target_is_dead = True
        self._driver.changed.notify()

    async def run(self) -> MigrationReport:
        """Move the group. Returns when it is released: nothing needs this host any more.

        `MigrationAborted` when the group stays, and runs here again; `FencedError` when a third party has it.
        Nothing else that link, peer, store or workload do ends it. Cancelled before the handover was sent, it
        is undone first; cancelled later, the guest stays suspended and the offer record on disk, for `restore`.
        """
        async with task_group() as tasks:
            helpers = (
                tasks.create_task(self._report.tell_progress(self._driver.changed)),
                tasks.create_task(self._keep_link()),
            )
            try:
                await self._drive()
            finally:
                self._steering.release()
                self._link.close()
                for helper in helpers:
                    helper.cancel()
        self._watch.enter(Phase.ENDED, self._driver.reason)
        if self.state is SourceState.ABORTED:
            raise self._driver.aborted(MigrationAborted, f"group {self.group.name} stays on this host")
        if self.state is SourceState.FENCED:
            raise FencedError(f"a third party took group {self.group.name} during its migration")
        return self.report

    async def _keep_link(self) -> None:
        await self._effects.may_dial.wait()
        await self._link.run()

    async def _drive(self) -> None:
        try:
            await self._driver.drive()
        except asyncio.CancelledError:
            if self.state in _BEFORE_HANDOVER:
                self._driver.machine.step(Event.FAILED)
                await self._driver.drive()
            raise
