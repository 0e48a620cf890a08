"""The target of a migration: a group arrives at this host.

`TargetMigration.run` is the whole life of one migration on this side, from an accepted offer until the source has
understood that it is not needed any more. What may happen when is in the tables of `silo.p2p.handover`, what is done
then in `silo.p2p.target_effects`; what happens to chunks is in `silo.p2p.installer`, and what is said on the link in
`silo.p2p.target_session`. This module puts them together.

After a restart of the process a migration goes on from its handover record (`TargetMigration.restore`), if there is
one; without it there never was a migration.
"""

from __future__ import annotations

from silo.errors import FencedError, InvalidRequestError, InvariantError, MigrationAborted, MigrationError
from silo.events import MigrationReport, Outcome, Phase
from silo.group import Group
from silo.p2p.driver import Driver
from silo.p2p.handover import TARGET, Event, Machine, TargetState
from silo.p2p.installer import Installer
from silo.p2p.peer_source import PeerSource
from silo.p2p.ports import Plugs, Site
from silo.p2p.reception import IncomingOffer, Reception
from silo.p2p.records import HandoverRecord, decode_handover, decode_handover_record
from silo.p2p.target_effects import TargetEffects, TargetParts
from silo.p2p.target_session import TargetSession
from silo.p2p.watch import Watch

__all__ = ["TargetMigration"]

_RUNNING = frozenset(
    {TargetState.RUNNING, TargetState.EVACUATING, TargetState.EVACUATED, TargetState.FINISHED}
)
_EVACUATED = frozenset({TargetState.EVACUATED, TargetState.FINISHED})
_OUTCOMES = {
    TargetState.DISCARDED: Outcome.ABORTED,
    TargetState.EVACUATED: Outcome.TAKEN,
    TargetState.FINISHED: Outcome.TAKEN,
}


class TargetMigration:
    """See the module; made by `accept` or `restore`, and runs once. Until the claim the group's gate is closed."""

    def __init__(
        self,
        group: Group,
        reception: Reception,
        site: Site,
        plugs: Plugs,
        *,
        offer: IncomingOffer | None = None,
        record: HandoverRecord | None = None,
    ) -> None:
        if (offer is None) == (record is None):
            raise InvariantError("a migration begins with an offer or goes on with a record")
        clock, settings = site.clock, site.settings
        body = decode_handover(record.body) if record is not None and record.body else None
        offered = offer.volumes if offer else tuple(part.volume for part in body.volumes) if body else ()
        names = [volume.name for volume in offered] or list(group.volumes)
        if set(names) != set(group.volumes):
            raise InvalidRequestError(f"the group has other volumes than the offer: {', '.join(names)}")
        self.group = group
        self.id = offer.migration if offer else record.migration if record else b""
        self._reception = reception
        self._watch = watch = Watch(group.name, clock, plugs.emit, plugs.consent)
        machine = Machine(TARGET, TARGET.restart[record.mark] if record else None)
        self._driver = driver = Driver(machine, clock, settings, watch)
        peer = PeerSource(names)
        self._installer = Installer(self.id, [group.volumes[name] for name in names], peer, clock)
        self._session = TargetSession(
            site.host, self._installer, peer, watch, clock, settings, driver.changed,
            state=lambda: self.state, post=driver.post, standing=lambda: self._effects.standing(),
        )  # fmt: skip
        self.source_host = offer.source_host if offer else record.source_host if record else ""
        """The name of the host that the group comes from."""
        self._effects = TargetEffects(
            TargetParts(
                self.id, group, site, plugs, watch, driver, self._installer, peer, self._session,
                offer, self.source_host, body, record.body if record else b"",
            )
        )  # fmt: skip
        driver.set_effects(self._effects.table())
        self._has_ended = False

    @classmethod
    def accept(cls, group: Group, offer: IncomingOffer, site: Site, plugs: Plugs) -> TargetMigration:
        """Take a group in. ``group`` has the volumes that are offered, on devices of our own, and a closed gate.

        `InvalidRequestError` when the volumes are others. The source hears of the acceptance when `run` has seen
        that everything is in order.
        """
        return cls(group, offer.reception, site, plugs, offer=offer)

    @classmethod
    def restore(
        cls, group: Group, record: bytes, reception: Reception, site: Site, plugs: Plugs
    ) -> TargetMigration:
        """Go on after a restart, from the content of the handover record.

        The group's maps and devices must be as they were left, and its gate closed unless `is_evacuated` of the
        result. The register is asked again before anything else. `CorruptionError` when the record is damaged.
        """
        migration = cls(group, reception, site, plugs, record=decode_handover_record(record))
        reception.attach(migration.id, migration._session)
        return migration

    @property
    def state(self) -> TargetState:
        """Where it stands."""
        return self._driver.machine.state

    @property
    def is_evacuated(self) -> bool:
        """Nothing is needed from the source any more."""
        return self.state in _EVACUATED

    @property
    def report(self) -> MigrationReport:
        """What it has come to so far; final once `run` has ended."""
        phases = self._watch.timings
        return MigrationReport(
            group=self.group.name,
            migration=self.id.hex(),
            outcome=_OUTCOMES.get(self.state),
            reason=self._driver.reason if self.state is TargetState.DISCARDED else "",
            phases=phases,
            duration_s=sum(timing.duration_s for timing in phases),
            bytes_peer=self._installer.meter.total,
            bytes_store=self._effects.bytes_store,
        )

    def abort(self, reason: str) -> None:
        """Give it up, if the handover has not come yet; `run` then ends with `MigrationAborted`. Later: nothing."""
        if self.state is TargetState.RECEIVING:
            self._driver.post(Event.FAILED, MigrationAborted(reason))

    async def wait_running(self) -> None:
        """Return when the guest runs here; `MigrationAborted` when it never will. No deadline: the source decides."""
        await self._wait(_RUNNING)

    async def wait_evacuated(self) -> None:
        """Return when nothing is needed from the source any more; `MigrationAborted` when it came to nothing."""
        await self._wait(_EVACUATED)

    async def _wait(self, states: frozenset[TargetState]) -> None:
        await self._driver.changed.until(lambda: self.state in states or self._has_ended)
        if self.state not in states:
            raise self._aborted()

    async def run(self) -> MigrationReport:
        """Take the group in. Returns when the source has understood that it is not needed any more, which may be
        never; `wait_evacuated` says when it does not matter.

        `FencedError` when somebody else has taken the group since it came here: then everything is kept.
        `MigrationAborted` when nothing came of it. Cancelled before the handover was recorded there is no trace
        of it; cancelled later, the record stays on disk, for `restore`.
        """
        try:
            await self._driver.drive()
        finally:
            self._has_ended = True
            self._driver.changed.notify()
            self._reception.forget(self.id)
            await self._session.close()
        self._watch.enter(Phase.ENDED, self._driver.reason)
        if self.state is TargetState.DISCARDED:
            raise self._aborted()
        if self.state is TargetState.FENCED:
            raise FencedError(
                f"group {self.group.name} was taken away from this host after it had come here",
                hint="what is here is kept; nothing serves it any more",
            )
        return self.report

    def _aborted(self) -> MigrationError:
        return self._driver.aborted(MigrationAborted, f"group {self.group.name} did not come to this host")
