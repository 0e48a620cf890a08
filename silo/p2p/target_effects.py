"""What the target of a migration does in each state of its table.

One method per effect of `silo.p2p.handover.TARGET`. Each either returns (the next effect follows), returns an event
(which ends the duties of the state), or raises (which the driver turns into FAILED). A method may be cancelled at
any await when a message decides the state; then another state's duties make it good.
"""

from __future__ import annotations

import asyncio

import attrs

from silo.chunkmap import Residency
from silo.errors import (
    CorruptionError,
    FencedError,
    InvalidRequestError,
    InvariantError,
    SiloError,
    UnavailableError,
)
from silo.events import Phase, Progress, StepFailed
from silo.group import Group
from silo.p2p.driver import Driver, Perform
from silo.p2p.handover import Effect, Event, Mark, TargetState
from silo.p2p.installer import Installer
from silo.p2p.messages import TEXT_MAX, Declined, Evacuated, Message, Taken
from silo.p2p.peer_source import PeerSource
from silo.p2p.ports import Plugs, Site
from silo.p2p.reception import IncomingOffer
from silo.p2p.records import HANDOVER_RECORD, HandoverBody, HandoverRecord, encode_record
from silo.p2p.target_session import TargetSession
from silo.p2p.watch import Watch

__all__ = ["TargetEffects", "TargetParts"]

FENCE_ATTEMPTS = 3


@attrs.define(eq=False)
class TargetParts:
    """Everything that one migration consists of at its target."""

    id: bytes
    group: Group
    site: Site
    plugs: Plugs
    watch: Watch
    driver: Driver[TargetState]
    installer: Installer
    peer: PeerSource
    session: TargetSession
    offer: IncomingOffer | None
    """``None`` after a restart."""
    source_host: str
    body: HandoverBody | None
    encoded: bytes
    """The handover, once it came, and its bytes."""


class TargetEffects:
    """See the module."""

    def __init__(self, parts: TargetParts) -> None:
        self.epoch = 0
        """What the claim has won; 0 without a store."""
        self.bytes_store = 0
        """Pulled from the store up to the evacuation."""
        self._p = parts
        self._settings = parts.site.settings
        self._changed = parts.driver.changed
        self._workload_s = 0.0
        self._is_prepared = parts.offer is None
        """The hook ``prepare`` was called, perhaps by an earlier process."""

    def table(self) -> dict[Effect, Perform]:
        """The method of each effect."""
        return {
            Effect.INSTALL: self.install,
            Effect.APPLY_HANDOVER: self.apply_handover,
            Effect.WRITE_HANDOVER: self.write_handover,
            Effect.HOLD_COMMITS: self.hold_commits,
            Effect.SETTLE_MAPS: self.settle_maps,
            Effect.CLAIM: self.claim,
            Effect.OPEN_GATE: self.open_gate,
            Effect.RESUME: self.resume,
            Effect.SEND_TAKEN: self.send_taken,
            Effect.PULL: self.pull,
            Effect.FLUSH_INSTALLED: self.flush_installed,
            Effect.WRITE_EVACUATED: self.write_evacuated,
            Effect.RELEASE_COMMITS: self.release_commits,
            Effect.SEND_EVACUATED: self.send_evacuated,
            Effect.DROP_HANDOVER: self.drop_handover,
            Effect.SEND_DECLINED: self.send_declined,
            Effect.FAIL_GATE: self.fail_gate,
        }

    def standing(self) -> list[Message]:
        """What the source should know of the state that we are in, on every new link."""
        state = self._p.driver.machine.state
        if state in (TargetState.RUNNING, TargetState.EVACUATING):
            return [self._taken()]
        if state in (TargetState.EVACUATED, TargetState.FINISHED):
            return [self._taken(), Evacuated(bytes_store=self.bytes_store)]
        if state is TargetState.DISCARDED:
            return [Declined(message=self._p.driver.reason[:TEXT_MAX])]
        return []

    def _taken(self) -> Taken:
        return Taken(epoch=self.epoch, workload_s=self._workload_s)

    # ---- pre-copy ---------------------------------------------------------------------------------------

    async def install(self) -> None:
        """Get ready, accept, and let the session install what comes, until the handover or until nobody comes."""
        parts, offer = self._p, self._p.offer
        if offer is None:
            raise InvariantError("a migration was restored to a state that does not survive a restart")
        parts.watch.enter(Phase.CONNECTING)
        await parts.group.gate.close_and_drain()
        await self._check(offer)
        await parts.installer.start_empty()
        self._is_prepared = True
        await parts.plugs.guest.prepare()
        await parts.watch.ask(Phase.PRE_COPY)
        offer.decide(parts.session)
        while True:
            await self._wait_lost()

    async def _check(self, offer: IncomingOffer) -> None:
        """Safety rule 7: both hosts see one register; and the volumes are those that were offered."""
        ownership = self._p.plugs.ownership
        if (offer.generation is None) != (ownership is None):
            where = "the source" if ownership is None else "this host"
            raise InvalidRequestError(
                f"only {where} keeps group {offer.group} in a store", hint="give both hosts the same store"
            )
        if ownership is not None:
            await ownership.check_proof(offer.proof)
        offered = {volume.name: volume.geometry() for volume in offer.volumes}
        present = {name: volume.geometry for name, volume in self._p.group.volumes.items()}
        if offered != present:
            raise InvalidRequestError("the volumes here are not those that were offered")

    async def _wait_lost(self) -> None:
        """Wait until the link breaks, and then for its return, for as long as our patience lasts."""
        session, patience_s = self._p.session, self._settings.patience_s
        await self._changed.until(lambda: session.down_since is not None)
        try:
            async with asyncio.timeout(patience_s):
                await self._changed.until(lambda: session.down_since is None)
        except TimeoutError as error:
            raise UnavailableError(f"the source has been away for {patience_s:g} s") from error

    # ---- the claim --------------------------------------------------------------------------------------

    async def apply_handover(self) -> None:
        """Ask the observers; then let the map tell what we do not have."""
        parts = self._p
        if parts.session.handover is None:
            raise InvariantError("a handover was applied before it came")
        parts.body, parts.encoded = parts.session.handover
        await parts.watch.ask(Phase.SWITCHOVER)
        await parts.installer.apply(parts.body)

    async def write_handover(self) -> None:
        """From here on a restart claims."""
        await self._write(Mark.HANDED)

    async def _write(self, mark: Mark) -> None:
        parts = self._p
        record = HandoverRecord(
            mark=mark,
            migration=parts.id,
            source_host=parts.source_host,
            body=parts.encoded if mark is Mark.HANDED else b"",
        )
        await parts.plugs.records.write_record(HANDOVER_RECORD, encode_record(record))

    async def hold_commits(self) -> None:
        """Nothing is committed until everything is here (safety rule 1)."""
        if self._p.plugs.ownership is not None:
            await self._p.plugs.ownership.hold_commits()

    async def settle_maps(self) -> None:
        """Say where what is absent is to be had."""
        self._p.installer.settle(self._handover)
        self._changed.notify()

    @property
    def _handover(self) -> HandoverBody:
        if self._p.body is None:
            raise InvariantError("a migration went on without its handover")
        return self._p.body

    async def claim(self) -> Event:
        """Ask the register for the group, for as long as it takes to get an answer."""
        ownership = self._p.plugs.ownership
        if ownership is None:
            return Event.WON  # the record on our disk is the claim
        try:
            self.epoch = await ownership.claim(self._handover.terms)
        except (FencedError, CorruptionError) as error:
            self._p.driver.error = error
            # Only an earlier process can have won, and have let the guest run here (safety rule 2).
            was_here = self._p.offer is None and await ownership.may_have_won(self._handover.terms)
            return Event.FENCED if was_here else Event.LOST
        return Event.WON

    async def fail_gate(self) -> None:
        """Nobody reads what another host's history has overtaken. The record stays, and with it what is here."""
        group = self._p.group
        group.gate.fail(FencedError(f"group {group.name} was taken away from this host"))

    async def open_gate(self) -> None:
        """Reads and writes go on here. What only the source has is demanded from it."""
        group = self._p.group
        for volume in group.volumes.values():
            volume.set_source(Residency.ABSENT_PEER, self._p.peer)
        group.gate.reopen()

    async def resume(self) -> None:
        """Let the guest run here."""
        guest = self._p.plugs.guest
        before = guest.spent_s
        try:
            await guest.resume(self._handover.state)
            await guest.unquiesce()
        finally:
            self._workload_s += guest.spent_s - before

    # ---- post-copy --------------------------------------------------------------------------------------

    async def send_taken(self) -> None:
        """The guest runs here."""
        self._p.watch.enter(Phase.POST_COPY)
        await self._p.session.say(self._taken())

    async def pull(self) -> None:
        """Wait until nothing is needed from the source any more; ask for what its pushes have left out."""
        session = self._p.session
        while left := self._needed_bytes():
            self._p.watch.tell(Progress, **self._progress(left))
            if session.is_drained and session.bulk is not None:
                session.is_drained = False
                await session.say_need()
            try:
                async with asyncio.timeout(self._settings.progress_s):
                    await self._changed.until(lambda: session.is_drained)
            except TimeoutError:
                continue  # the guest may have overwritten the last of it

    def _needed_bytes(self) -> int:
        """What only the source has, in whole chunks."""
        volumes, needed = self._p.installer.volumes, self._p.installer.needed()
        return sum(len(n) * v.geometry.chunk_size for v, n in zip(volumes, needed, strict=True))

    def _progress(self, left: int) -> dict[str, object]:
        meter = self._p.installer.meter
        rate = meter.rate_bps(self._p.site.clock.monotonic())
        return {
            "phase": Phase.POST_COPY,
            "bytes_peer": meter.total,
            "rate_bps": rate,
            "exposed_bytes": left,
            "remaining_bytes": left,
            "eta_s": left / rate if rate else None,
        }

    async def flush_installed(self) -> None:
        """What is counted must be durable (safety rule 13): data, then maps."""
        await self._p.group.flush()

    async def write_evacuated(self) -> None:
        """From here on a restart does not need the source."""
        self.bytes_store = self._p.plugs.bytes_store()
        await self._write(Mark.EVACUATED)

    async def release_commits(self) -> None:
        """The first commit covers everything that the source had not committed: all of it is dirty."""
        for volume in self._p.group.volumes.values():
            volume.set_source(Residency.ABSENT_PEER, None)
        if self._p.plugs.ownership is not None:
            await self._p.plugs.ownership.release_commits()
        self._p.watch.enter(Phase.EVACUATED)

    async def send_evacuated(self) -> None:
        """Tell the source, on every link, until it says that it knows. No deadline: it may be switched off for ever,
        and nothing here waits for it."""
        await self._p.session.say(*self.standing()[1:])
        await self._changed.until(lambda: False)

    # ---- the end ----------------------------------------------------------------------------------------

    async def drop_handover(self) -> None:
        """There is no migration any more."""
        await self._p.plugs.records.delete_record(HANDOVER_RECORD)

    async def send_declined(self) -> None:
        """Tell the source that it can have its group back, as far as we are concerned."""
        reason = self._p.driver.reason[:TEXT_MAX]
        if self._p.offer is not None:
            self._p.offer.refuse(reason)
        await self._p.session.say(Declined(message=reason))
        await self._undo_prepare()

    async def _undo_prepare(self) -> None:
        """What ``prepare`` has started must not stay here. Tried a few times; a failure is told."""
        if not self._is_prepared:
            return
        for _ in range(FENCE_ATTEMPTS):
            try:
                await self._p.plugs.guest.fence()
            except SiloError as error:
                self._p.watch.tell(
                    StepFailed, step="fence", reason=str(error), retry_s=self._settings.retry_min_s
                )
                await asyncio.sleep(self._settings.retry_min_s)
            else:
                return
