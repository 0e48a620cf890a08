"""Pre-copy at the source: find the target, agree, and send rounds until the guest can be stopped.

The one effect of the state COPYING. It only watches: pushing is the business of `silo.p2p.pusher`, which runs with
the link, so a link that breaks and returns is nothing to this module until patience ends. What follows is decided by
the budget (`silo.p2p.budget`), which is asked through the migration's `silo.p2p.steering.Steering`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import attrs

from silo.abc import Clock
from silo.chunkmap import Residency
from silo.errors import InvalidRequestError, ProtocolError, SiloError, UnavailableError
from silo.events import Phase, RoundStarted
from silo.group import Group
from silo.p2p.budget import Action, Plan
from silo.p2p.channel import LinkRefused
from silo.p2p.convergence import RoundSummary
from silo.p2p.driver import Driver
from silo.p2p.handover import SourceState
from silo.p2p.messages import Stage
from silo.p2p.ports import Ownership, Plugs, Site
from silo.p2p.precopy import ROUND_MAX
from silo.p2p.pusher import Pusher
from silo.p2p.records import OfferRecord
from silo.p2p.rounds import Rounds
from silo.p2p.source_link import SourceLink
from silo.p2p.source_report import SourceReport
from silo.p2p.source_session import SourceSession
from silo.p2p.steering import Link, Steering
from silo.p2p.watch import Watch
from silo.tasks import task_group

__all__ = ["PreCopy", "SourceParts", "store_while_running"]

_log = logging.getLogger(__name__)

FOLLOW_RESERVE = 100
"""Rounds that are kept for the way from following to the switchover."""


@attrs.define(eq=False)
class SourceParts:
    """Everything that one migration consists of at its source."""

    id: bytes
    group: Group
    url: str
    site: Site
    plugs: Plugs
    steering: Steering
    watch: Watch
    driver: Driver[SourceState]
    rounds: Rounds
    pusher: Pusher
    session: SourceSession
    link: SourceLink
    report: SourceReport
    record: OfferRecord | None
    """The offer, once it is (about to be) on disk."""


class PreCopy:
    """See the module. ``may_dial`` is set when there is something to offer."""

    def __init__(self, parts: SourceParts, may_dial: asyncio.Event) -> None:
        self._p = parts
        self._may_dial = may_dial
        self._clock = parts.site.clock
        self._settings = parts.site.settings
        self._changed = parts.driver.changed

    async def copy(self) -> None:
        """Find the target, agree, and send until the rest is small enough to stop the guest for."""
        parts, ownership = self._p, self._p.plugs.ownership
        parts.watch.enter(Phase.CONNECTING)
        await self._check_movable()
        await parts.plugs.guest.prepare()
        proof = await ownership.write_proof() if ownership else ""
        try:
            parts.rounds.begin_first()
            if ownership is not None:
                # In one step with the start of the recorder: whatever is newer than this base is recorded.
                parts.session.generation = ownership.standing().generations[0]
                parts.session.proof = proof
            self._may_dial.set()
            await self._wait_accepted()
        finally:
            if ownership is not None:
                await self._erase(proof)
        await parts.watch.ask(Phase.PRE_COPY)
        if ownership is not None:
            await parts.rounds.want_hot(parts.steering.hot_size(self._link(), self._settings.hot_size))
            parts.rounds.reorder()
            self._changed.notify()
        await self._run_rounds()
        if ownership is not None and parts.steering.policy.durable_before_switch:
            await self._store_first(ownership)
        await parts.group.flush()  # so that little is left for the flush that the guest waits for

    async def _check_movable(self) -> None:
        """Safety rule 1: a group has at most one peer source."""
        group = self._p.group
        if group.absent_counts((Residency.ABSENT_PEER,)):
            raise InvalidRequestError(
                f"group {group.name} still needs chunks of the host that it came from",
                hint="wait until it is evacuated, then move it on",
            )

    async def _erase(self, proof: str) -> None:
        try:
            if self._p.plugs.ownership is not None:
                await self._p.plugs.ownership.erase_proof(proof)
        except SiloError as error:
            _log.warning("a proof of %s stays in the store: %s", self._p.group.name, error)

    # ---- a target -----------------------------------------------------------------------------------------

    async def _wait_accepted(self) -> None:
        """With a deadline it is worth dialling again, for as long as the store can wait; but not a host that
        refuses, or that does not speak as we do."""
        link, session = self._p.link, self._p.session
        may_wait = self._p.steering.left_s is not None

        def is_known() -> bool:
            refused = link.error is not None and (
                not may_wait or isinstance(link.error, LinkRefused | ProtocolError)
            )
            return session.stage is not Stage.NEW or refused

        try:
            async with asyncio.timeout(self._settings.accept_timeout_s):
                while not await self._happens(is_known):
                    self._follow(self._p.steering.look(self._link()))
        except TimeoutError as error:
            raise UnavailableError(f"{self._p.url} has not accepted the group: {link.error}") from error
        if session.stage is Stage.NEW and link.error is not None:
            raise link.error

    async def _happens(self, condition: Callable[[], bool]) -> bool:
        """Wait for it until it is time to look at the plan again; whether it has happened."""
        try:
            async with asyncio.timeout(self._settings.look_s):
                await self._changed.until(condition)
        except TimeoutError:
            return condition()
        return True

    def _follow(self, plan: Plan) -> Plan:
        """Give the migration up when the plan is to go to the store instead."""
        if plan.action is Action.STORE:
            raise UnavailableError(
                f"{plan.reason}: {self._p.link.error}" if self._p.link.error else plan.reason
            )
        return plan

    # ---- rounds -------------------------------------------------------------------------------------------

    async def _run_rounds(self) -> None:
        rounds, planner, pusher = self._p.rounds, self._p.rounds.planner, self._p.pusher
        before = planner.wanted_bytes
        while True:
            if self._p.watch.phase is not Phase.FOLLOWING:  # where there is no end of them
                self._p.watch.tell(
                    RoundStarted,
                    round=rounds.count,
                    chunks=planner.wanted_chunks,
                    size=planner.wanted_bytes,
                )
            while not await self._happens(lambda: pusher.is_idle or self._is_broken()):
                if self._follow(self._p.steering.look(self._link())).action is Action.SWITCH:
                    return
            if self._is_broken():
                raise self._broken()
            summary = RoundSummary(
                round=rounds.count,
                dirty_bytes=rounds.dirty_bytes(),
                dirty_before=before,
                rate_bps=self._p.pusher.meter.rate_bps(self._clock.monotonic()),
            )
            plan = self._follow(self._p.steering.look(self._link(), summary))
            if plan.action is Action.SWITCH:
                if not self._p.steering.is_following:
                    return
                await self._follow_until_due()
            before = summary.dirty_bytes
            rounds.begin_next()
            self._changed.notify()

    async def _follow_until_due(self) -> None:
        """The target is as close as it gets: wait until there is something for another round, or no more to follow."""
        parts, rounds = self._p, self._p.rounds
        if rounds.planner.round > ROUND_MAX - FOLLOW_RESERVE:
            raise UnavailableError(
                f"group {parts.group.name} was followed for {rounds.planner.round} rounds",
                hint="begin again: the target has what it got",
            )
        parts.watch.enter(Phase.FOLLOWING)
        while parts.steering.is_following and not self._is_broken():
            try:
                async with asyncio.timeout(self._settings.follow_s):
                    await self._changed.until(lambda: not parts.steering.is_following or self._is_broken())
            except TimeoutError:
                if rounds.dirty_bytes():
                    return
        if not parts.steering.is_following:
            parts.watch.enter(Phase.PRE_COPY)

    def _link(self) -> Link:
        parts = self._p
        planner, written = parts.rounds.planner, parts.rounds.dirty_bytes()
        return Link(
            sent=parts.pusher.meter.total,
            is_busy=planner.wanted_bytes > 0,
            is_up=parts.link.down_since is None,
            round=0 if parts.session.stage is Stage.NEW else max(1, parts.rounds.count),
            only_here=planner.unique_bytes + written,
            written=written,
        )

    def _is_broken(self) -> bool:
        down_since = self._p.link.down_since
        impatient = down_since is not None and (
            self._clock.monotonic() - down_since > self._settings.patience_s
        )
        return impatient or self._p.pusher.error is not None

    def _broken(self) -> SiloError:
        if self._p.pusher.error is not None:
            return self._p.pusher.error
        return UnavailableError(
            f"the link has been down for {self._settings.patience_s:g} s: {self._p.link.error}"
        )

    # ---- the store first ----------------------------------------------------------------------------------

    async def _store_first(self, ownership: Ownership) -> None:
        """Commit while the guest runs, so that little is left to commit while it stands still."""
        self._p.watch.enter(Phase.STORING)
        await store_while_running(
            ownership, self._p.steering, self._p.group, self._settings.look_s, self._clock
        )


async def store_while_running(
    ownership: Ownership, steering: Steering, group: Group, look_s: float, clock: Clock
) -> Plan:
    """Commit again and again while the guest writes, until the plan is to stop the guest for the rest.

    A store that does not answer is waited for until the plan says otherwise. `FencedError` when another host owns
    the group. The guest stays limited, see `Steering.release`.
    """
    count, before = 0, group.exposed_bytes
    while True:
        if (plan := steering.look_at_store()).action is Action.SWITCH:
            return plan
        started = clock.monotonic()
        async with task_group() as tasks:
            storing = tasks.create_task(ownership.store_all())
            while not (await asyncio.wait((storing,), timeout=look_s))[0]:
                if (plan := steering.look_at_store()).action is Action.SWITCH:
                    storing.cancel()
                    return plan
        count += 1
        left = group.exposed_bytes
        took_s = max(clock.monotonic() - started, 1e-3)
        summary = RoundSummary(round=count, dirty_bytes=left, dirty_before=before, rate_bps=before / took_s)
        if (plan := steering.look_at_store(summary)).action is Action.SWITCH:
            return plan
        before = left
