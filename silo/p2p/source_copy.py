"""Pre-copy at the source: find the target, agree, and send rounds until the guest can be stopped.

The one effect of the state COPYING. It only watches: pushing is the business of `silo.p2p.pusher`, which runs with
the link, so a link that breaks and returns is nothing to this module until patience ends.
"""

from __future__ import annotations

import asyncio
import logging

import attrs

from silo.chunkmap import Residency
from silo.errors import InvalidRequestError, SiloError, UnavailableError
from silo.events import Phase, RoundStarted
from silo.group import Group
from silo.p2p.convergence import Decision, RoundSummary, decide, must_switch
from silo.p2p.driver import Driver
from silo.p2p.handover import SourceState
from silo.p2p.messages import Stage
from silo.p2p.ports import Plugs, Site
from silo.p2p.pusher import Pusher
from silo.p2p.records import OfferRecord
from silo.p2p.rounds import Rounds
from silo.p2p.source_link import SourceLink
from silo.p2p.source_report import SourceReport
from silo.p2p.source_session import SourceSession
from silo.p2p.watch import Watch

__all__ = ["PreCopy", "SourceParts"]

_log = logging.getLogger(__name__)


@attrs.define(eq=False)
class SourceParts:
    """Everything that one migration consists of at its source."""

    id: bytes
    group: Group
    url: str
    site: Site
    plugs: Plugs
    deadline: float | None
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
            await parts.rounds.want_hot(self._settings.hot_size)
            parts.rounds.reorder()
            self._changed.notify()
        await self._run_rounds()
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

    async def _wait_accepted(self) -> None:
        link, session = self._p.link, self._p.session
        try:
            async with asyncio.timeout(self._settings.accept_timeout_s):
                await self._changed.until(lambda: session.stage is not Stage.NEW or link.error is not None)
        except TimeoutError as error:
            raise UnavailableError(f"{self._p.url} has not accepted the group") from error
        if session.stage is Stage.NEW and link.error is not None:
            raise link.error

    async def _run_rounds(self) -> None:
        rounds, planner = self._p.rounds, self._p.rounds.planner
        before = planner.wanted_bytes
        while True:
            self._p.watch.tell(
                RoundStarted,
                round=rounds.count,
                chunks=planner.wanted_chunks,
                size=planner.wanted_bytes,
            )
            await self._changed.until(
                lambda: self._p.pusher.is_idle or self._must_hurry() or self._is_broken()
            )
            if self._is_broken():
                raise self._broken()
            summary = RoundSummary(
                round=rounds.count,
                dirty_bytes=rounds.dirty_bytes(),
                dirty_before=before,
                rate_bps=self._rate_bps(),
                time_left_s=self._time_left_s(),
            )
            if self._must_hurry() or self._decide(summary) is Decision.SWITCH:
                return
            before = summary.dirty_bytes
            rounds.begin_next()
            self._changed.notify()

    def _decide(self, summary: RoundSummary) -> Decision:
        settings = self._settings
        return decide(
            summary,
            rounds_max=settings.rounds_max,
            switch_size=settings.switch_size,
            switch_s=settings.switch_s,
        )

    def _must_hurry(self) -> bool:
        unique = self._p.rounds.planner.unique_bytes
        return must_switch(unique, self._rate_bps(), self._time_left_s())

    def _rate_bps(self) -> float:
        return self._p.pusher.meter.rate_bps(self._clock.monotonic())

    def _time_left_s(self) -> float | None:
        return None if self._p.deadline is None else self._p.deadline - self._clock.monotonic()

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
