"""What the source of a migration does in each state of its table.

One method per effect of `silo.p2p.handover.SOURCE`. Each either returns (the next effect follows), returns an event
(which ends the duties of the state), or raises (which the driver turns into FAILED). A method may be cancelled at
any await when a message decides the state; then another state's duties make it good, so nothing here has a
``finally`` that undoes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math

import msgspec
from blake3 import blake3

from silo.errors import (
    ClosedError,
    FencedError,
    InvariantError,
    ProtocolError,
    SiloError,
    UnavailableError,
)
from silo.events import HandoverDoubt, Phase, StepFailed
from silo.p2p.budget import Action
from silo.p2p.channel import Channel
from silo.p2p.driver import Perform
from silo.p2p.handover import Effect, Event, Mark
from silo.p2p.messages import TEXT_MAX, Handover, Message, Released, Stage, Withdraw
from silo.p2p.records import OFFER_RECORD, HandoverBody, OfferRecord, encode_handover, encode_record
from silo.p2p.source_copy import PreCopy, SourceParts
from silo.p2p.terms import Standing, Terms, Verdict

__all__ = ["SourceEffects"]

_log = logging.getLogger(__name__)

COURTESY_S = 1.0
"""For words that help the other side and change nothing here."""
NONCE_SIZE = 16

_VERDICTS = {Verdict.WON: Event.WON, Verdict.LOST: Event.LOST, Verdict.FENCED: Event.FENCED}


FENCE_ATTEMPTS = 3
"""When everything has arrived already."""


class SourceEffects:
    """See the module."""

    def __init__(self, parts: SourceParts) -> None:
        self.may_dial = asyncio.Event()
        """Set when there is something to offer."""
        self._precopy = PreCopy(parts, self.may_dial)
        self.target_is_dead = False
        """Somebody asserts that the target is gone for ever; counts only without a store."""
        self._p = parts
        self._clock = parts.site.clock
        self._settings = parts.site.settings
        self._changed = parts.driver.changed
        self._stops_guest = parts.record is not None
        """Hooks that stop the guest have been called, perhaps by an earlier process."""
        self._is_fenced = False
        self._state = b""
        self._encoded = b""
        if parts.record is not None:
            self.may_dial.set()

    def table(self) -> dict[Effect, Perform]:
        """The method of each effect."""
        return {
            Effect.COPY: self._precopy.copy,
            Effect.HOLD_COMMITS: self.hold_commits,
            Effect.WRITE_OFFER: self.write_offer,
            Effect.SUSPEND: self.suspend,
            Effect.CLOSE_GATE: self.close_gate,
            Effect.FLUSH: self.flush,
            Effect.SEND_HANDOVER: self.send_handover,
            Effect.AWAIT_ANSWER: self.await_answer,
            Effect.RECLAIM: self.reclaim,
            Effect.SERVE: self.serve,
            Effect.WRITE_RELEASED: self.write_released,
            Effect.SEND_RELEASED: self.send_released,
            Effect.OPEN_GATE: self.open_gate,
            Effect.UNSUSPEND: self.unsuspend,
            Effect.RELEASE_COMMITS: self.release_commits,
            Effect.DROP_OFFER: self.drop_offer,
            Effect.SEND_WITHDRAW: self.send_withdraw,
            Effect.FAIL_GATE: self.fail_gate,
        }

    # ---- switchover -------------------------------------------------------------------------------------

    async def hold_commits(self) -> None:
        """From here on the store shows one of the generations that the offer names."""
        if self._p.plugs.ownership is not None:
            await self._p.plugs.ownership.hold_commits()

    async def write_offer(self) -> None:
        """Before the guest is stopped, so that it need not wait for the disk."""
        parts = self._p
        ownership = parts.plugs.ownership
        standing = ownership.standing() if ownership else Standing(0, "", ())
        parts.record = OfferRecord(
            mark=Mark.OFFERED,
            migration=parts.id,
            group=parts.group.name,
            target_url=parts.url,
            target_host=parts.session.target_host or "",
            terms=Terms(
                epoch=standing.epoch,
                incarnation=standing.incarnation,
                generations=standing.generations,
                nonce=self._clock.token(NONCE_SIZE).hex(),
            ),
            reclaim_nonce=self._clock.token(NONCE_SIZE).hex(),
            volumes=tuple(parts.rounds.offers()),
        )
        await parts.plugs.records.write_record(OFFER_RECORD, encode_record(parts.record))

    async def suspend(self) -> None:
        """Ask the observers, then stop the guest. What it and its manager have cached goes to the devices."""
        parts, guest = self._p, self._p.plugs.guest
        if parts.link.bulk is None:
            raise UnavailableError(f"the link broke right before the switchover: {parts.link.error}")
        await parts.watch.ask(Phase.SWITCHOVER)
        self._stops_guest = True
        await guest.quiesce()
        parts.report.stopping(guest.spent_s)
        await guest.suspend()
        await guest.flush()
        self._state = await guest.capture()

    async def close_gate(self) -> None:
        """Nothing is read or written here any more."""
        await self._p.group.gate.close_and_drain()

    async def flush(self) -> None:
        """Make durable what the target may still ask for after our machine lost power; then add everything up."""
        parts = self._p
        parts.steering.release()
        await parts.group.flush()
        if parts.steering.policy.durable_before_switch:
            await self._store_last()
        parts.pusher.stop()
        volumes = parts.rounds.end(self._offer.volumes)
        body = HandoverBody(
            migration=parts.id,
            group=parts.group.name,
            source_host=parts.site.host,
            terms=self._offer.terms,
            volumes=volumes,
            state=self._state,
        )
        self._encoded = encode_handover(body)

    async def _store_last(self) -> None:
        """Commit what is left, now that nothing is written any more, and offer the generation that has it.

        The offer on disk named an older one until now. That is no harm: it has not been sent, and our own claim, with
        which a restart would begin, goes by the owner alone.
        """
        parts, ownership, left_s = self._p, self._p.plugs.ownership, self._p.steering.left_s
        if ownership is None:
            raise InvariantError("a group without a store was to be stored before its switchover")
        budget = parts.steering.budget
        patience_s = self._settings.patience_s if left_s is None else max(0.0, left_s - budget.pause_s)
        try:
            async with asyncio.timeout(patience_s):
                await ownership.store_all()
        except TimeoutError as error:
            if left_s is None:
                raise UnavailableError("the store has not taken the rest in time") from error
            reason = "the deadline is too near to store everything before the switchover"
            parts.steering.tell(Action.SWITCH, reason)
        terms = msgspec.structs.replace(self._offer.terms, generations=ownership.standing().generations)
        parts.record = msgspec.structs.replace(self._offer, terms=terms)
        await parts.plugs.records.write_record(OFFER_RECORD, encode_record(parts.record))

    @property
    def _offer(self) -> OfferRecord:
        if self._p.record is None:
            raise InvariantError("a handover went on without an offer")
        return self._p.record

    async def send_handover(self) -> None:
        """Say it once. If it cannot be said, or is lost with the link, the arbiter is asked."""
        parts = self._p
        bulk = parts.link.bulk
        if bulk is None:
            raise UnavailableError(f"the link broke during the switchover: {parts.link.error}")
        parts.session.stage = Stage.HANDED
        digest = blake3(self._encoded).digest()
        await bulk.send_parts(self._encoded, Handover(length=len(self._encoded), digest=digest))
        self._state = b""
        self._encoded = b""
        if parts.link.bulk is bulk:
            parts.pusher.is_frozen = True
            parts.rounds.begin_final()
            parts.pusher.start()

    async def await_answer(self) -> Event:
        """Until a message decides. A target that says nothing is given ``answer_timeout_s``, one that says that it is
        still claiming ``claim_timeout_s``. Once it has claimed, the arbiter could only confirm that, so then it has
        all the time that its workload needs, as long as it says so."""
        clock, session = self._clock, self._p.session
        answer_s = self._settings.answer_timeout_s
        limit = claim_limit = clock.monotonic() + self._settings.claim_timeout_s
        with contextlib.suppress(TimeoutError):
            while (now := clock.monotonic()) < limit:
                async with asyncio.timeout(min(answer_s, limit - now)):
                    await self._changed.until(lambda: session.work is not None)
                if session.work is not None:
                    limit = math.inf if session.work.claimed else claim_limit
                    session.work = None
        is_silent = clock.monotonic() < limit
        reason = "did not answer the handover in time" if is_silent else "could not claim the group in time"
        self._p.driver.error = UnavailableError(f"the target {reason}")
        return Event.TIMEOUT

    async def reclaim(self) -> Event:
        """Ask the arbiter to have the group back, for as long as it takes to get an answer."""
        parts, ownership = self._p, self._p.plugs.ownership
        reason = parts.driver.reason or "this host was restarted"
        parts.watch.enter(Phase.IN_DOUBT, reason)
        parts.watch.tell(HandoverDoubt, reason=reason)
        if ownership is not None:
            return _VERDICTS[await ownership.reclaim(self._offer.terms, self._offer.reclaim_nonce)]
        return await self._ask_target()

    async def _ask_target(self) -> Event:
        """Without a store only the target can say that it did not claim; its word comes as a message."""
        parts = self._p
        asked: Channel | None = None

        def may_go_on() -> bool:
            return parts.session.is_declined or self.target_is_dead or parts.link.bulk not in (None, asked)

        while not (parts.session.is_declined or self.target_is_dead):
            if parts.link.bulk not in (None, asked):
                asked = parts.link.bulk
                await self._say(Withdraw(message="the source wants the group back"))
            await self._changed.until(may_go_on)  # no deadline: nobody else can know
        return Event.WON

    # ---- the group is the target's ----------------------------------------------------------------------

    async def serve(self) -> Event:
        """Make sure that the guest cannot come back here; chunks are served by the link until the target has all.

        The target says when that is. One that has evacuated and ended meanwhile says nothing any more, but then it
        has committed: while the link is down, the register is asked.
        """
        parts = self._p
        parts.watch.enter(Phase.POST_COPY)
        while True:
            if await self._fence():
                break
            await asyncio.sleep(parts.driver.retry_delay_s())
        ownership = parts.plugs.ownership
        while True:
            await self._changed.until(lambda: parts.link.bulk is None and ownership is not None)
            await asyncio.sleep(self._settings.silence_s)
            if ownership is None or parts.link.bulk is not None:
                continue
            try:
                if await ownership.has_committed(self._offer.terms):
                    return Event.EVACUATED
            except SiloError as error:
                parts.watch.tell(
                    StepFailed, step="ask the register", reason=str(error), retry_s=self._settings.silence_s
                )

    async def _fence(self) -> bool:
        """Try once, unless it is done; a failure is told."""
        if not self._is_fenced:
            try:
                await self._p.plugs.guest.fence()
            except SiloError as error:
                self._p.watch.tell(StepFailed, step="fence", reason=str(error), retry_s=0.0)
            else:
                self._is_fenced = True
        return self._is_fenced

    async def write_released(self) -> None:
        """Everything is durable at the target: remember that nothing here counts any more."""
        released = msgspec.structs.replace(self._offer, mark=Mark.RELEASED)
        await self._p.plugs.records.write_record(OFFER_RECORD, encode_record(released))

    async def send_released(self) -> None:
        """Let the target forget us. If the link is down for longer, it will ask when it is up."""
        self._p.watch.enter(Phase.EVACUATED)
        await self._say(Released())
        # What evacuated so quickly that it interrupted the fencing does not spare the guest here. Tried a few times
        # and not for ever: a host that may be switched off must get to the point of saying so.
        for _ in range(FENCE_ATTEMPTS):
            if await self._fence():
                return
            await asyncio.sleep(self._settings.retry_min_s)

    # ---- the group is ours ------------------------------------------------------------------------------

    async def open_gate(self) -> None:
        """Reads and writes go on."""
        self._p.pusher.stop()
        self._p.pusher.is_frozen = False
        self._p.group.record_migration(False)
        self._p.group.gate.reopen()

    async def unsuspend(self) -> None:
        """Let the guest run on, if it was ever asked to stop."""
        if self._stops_guest:
            await self._p.plugs.guest.unsuspend()
            await self._p.plugs.guest.unquiesce()

    async def release_commits(self) -> None:
        """The store is kept up to date again."""
        if self._p.plugs.ownership is not None:
            await self._p.plugs.ownership.release_commits()

    async def drop_offer(self) -> None:
        """A restart from here on is an ordinary one."""
        await self._p.plugs.records.delete_record(OFFER_RECORD)

    async def send_withdraw(self) -> None:
        """Let the target forget us."""
        self._p.group.record_migration(False)
        await self._say(Withdraw(message=self._p.driver.reason[:TEXT_MAX]))

    async def fail_gate(self) -> None:
        """Whatever the guest still asks for ends with an error."""
        self._p.group.record_migration(False)
        self._p.group.gate.fail(FencedError(f"group {self._p.group.name} belongs to another host"))

    async def _say(self, message: Message) -> None:
        """Words that the other side will miss at worst for a while. A link that breaks over them is dialled again."""
        bulk = self._p.link.bulk
        if bulk is None:
            return
        try:
            async with asyncio.timeout(COURTESY_S):
                await bulk.send(message)
        except (UnavailableError, ClosedError, ProtocolError, TimeoutError) as error:
            _log.info("%s: %s was not said: %s", self._p.group.name, type(message).__name__, error)
            await bulk.aclose()
