"""Looking at how a group leaves its host, and doing what the budget says about it.

A `Steering` gathers what `silo.p2p.budget` decides by: what only this host has, how fast link and store carry, how
fast the guest writes. It measures nothing by itself but looks at counters whenever it is asked, a few times a second.
What it does by itself is small: it sets and lifts the guest's limit, and tells observers of each new decision. The
rest of a decision is carried out by whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from silo.abc import Clock
from silo.chunkmap import SYNC_DIRTY
from silo.events import Decided
from silo.group import Group
from silo.p2p.budget import Action, Budget, Capacity, Growth, Plan, Sight
from silo.p2p.convergence import RoundSummary
from silo.p2p.settings import MigrationPolicy, MigrationSettings
from silo.p2p.watch import Watch

__all__ = ["Link", "Steering"]

REASON = "leaving"
"""Under which the guest is limited."""


@attrs.frozen(kw_only=True)
class Link:
    """The link to a target, as of now."""

    sent: int
    is_busy: bool
    is_up: bool
    round: int
    only_here: int
    """What the target lacks, in bytes of chunks; with a store, whatever of that no commit covers must be carried."""
    written: int
    """By the guest, since the round began."""


class Steering:
    """See the module. ``uploaded`` as in `silo.p2p.ports.Ownership`; ``None`` without a store."""

    def __init__(
        self,
        group: Group,
        clock: Clock,
        settings: MigrationSettings,
        policy: MigrationPolicy,
        watch: Watch,
        *,
        deadline: float | None,
        uploaded: Callable[[], tuple[int, bool]] | None,
    ) -> None:
        self.policy = policy
        self.is_following = policy.follow
        """The target is to be kept close behind, and not to take over yet."""
        self.budget = Budget(
            started=clock.monotonic(),
            deadline=deadline,
            rounds_max=settings.rounds_max,
            switch_size=settings.switch_size,
            switch_s=settings.switch_s,
            may_throttle=policy.throttle,
        )
        self.store = Capacity()
        self.link = Capacity()
        self._group = group
        self._clock = clock
        self._watch = watch
        self._uploaded = uploaded
        self._growth = Growth()
        self._told: tuple[Action, str, float | None] | None = None

    def look(self, link: Link, summary: RoundSummary | None = None) -> Plan:
        """What follows on the way to a target."""
        now = self._clock.monotonic()
        self.link.look(now, link.sent, is_busy=link.is_busy and link.is_up)
        self._look_at_store(now)
        self._growth.look(now, link.written)
        unsynced = self._group.exposed_bytes if self._uploaded is not None else None
        only_here = link.only_here if unsynced is None else min(link.only_here, unsynced)
        sight = Sight(
            now=now,
            only_here=only_here,
            unsynced=unsynced if self.policy.evacuate else None,
            link_bps=self.link.rate_bps,
            store_bps=self.store.rate_bps,
            write_bps=self._growth.rate_bps(now),
            round=link.round,
            is_link_up=link.is_up,
            summary=summary,
        )
        return self._tell(self.budget.plan(sight), sight)

    def look_at_store(self, summary: RoundSummary | None = None) -> Plan:
        """What follows on the way to the store."""
        now = self._clock.monotonic()
        self._look_at_store(now)
        self._growth.look(now, self._fresh_bytes())
        unsynced = self._group.exposed_bytes
        sight = Sight(
            now=now,
            only_here=unsynced,
            unsynced=unsynced,
            store_bps=self.store.rate_bps,
            write_bps=self._growth.rate_bps(now),
            summary=summary,
        )
        plan = self._tell(self.budget.plan_store(sight), sight)
        self._group.throttle.limit(REASON, plan.write_bps)
        return plan

    def hot_size(self, link: Link, most: int) -> int:
        """How much of what the store has is worth sending, too."""
        now = self._clock.monotonic()
        return self.budget.hot_size(
            Sight(now=now, only_here=link.only_here, link_bps=self.link.rate_bps), most
        )

    def switch(self, deadline: float | None) -> None:
        """The target is to take over; by then, if there is a deadline."""
        if self.is_following:
            self.is_following = False
            now = self._clock.monotonic()
            self.budget = attrs.evolve(self.budget, started=now, deadline=deadline)

    def release(self) -> None:
        """The guest may write as it likes again: it stands still, or stays."""
        self._group.throttle.limit(REASON, None)

    @property
    def left_s(self) -> float | None:
        """Until the deadline; ``None`` without one."""
        deadline = self.budget.deadline
        return None if deadline is None else deadline - self._clock.monotonic()

    def tell(self, action: Action, reason: str, late_bytes: int = 0) -> None:
        """Tell observers of a decision that was made elsewhere."""
        self._watch.tell(
            Decided,
            action=action.value,
            reason=reason,
            left_s=self.left_s,
            exposed_bytes=self._group.exposed_bytes,
            late_bytes=late_bytes,
        )

    def _look_at_store(self, now: float) -> None:
        if self._uploaded is not None:
            sent, is_busy = self._uploaded()
            self.store.look(now, sent, is_busy=is_busy)

    def _fresh_bytes(self) -> int:
        return sum(
            volume.chunks.count_dirty(SYNC_DIRTY) * volume.geometry.chunk_size
            for volume in self._group.volumes.values()
        )

    def _tell(self, plan: Plan, sight: Sight) -> Plan:
        if self.is_following and plan.action is Action.SWITCH:
            return plan  # it will not be done: the target goes on following
        told = (plan.action, plan.reason, plan.write_bps)
        is_news = plan.action is not Action.COPY or plan.write_bps is not None
        if told != self._told and (is_news or self._told is not None):
            self._watch.tell(
                Decided,
                action=plan.action.value,
                reason=plan.reason,
                left_s=self.left_s,
                fits_bytes=plan.fits,
                exposed_bytes=sight.only_here,
                late_bytes=plan.late_by,
                write_bps=plan.write_bps,
            )
            self._told = told
        return plan
