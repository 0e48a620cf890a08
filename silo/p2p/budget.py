"""What can be done before a deadline: from a notice to rounds, hot set, switchover, throttle, or the store. Pure.

A host that is told when it will vanish has a budget. With T the time that is left, p what a switchover takes
(suspend, flush, capture, claim) and B what the carrier has shown, only ``f * B * (T - p)`` bytes can still be carried,
where f is the share of B that one may count on. What *must* be carried is Q: whatever only this host has. It depends on
how far the store is behind and on what the guest writes, and not at all on the size of the disk. The rule of
everything here is **Q stays below what fits**; it is looked at a few times a second, on measured rates:

* there is room: another round of pre-copy, and hot chunks besides, as long as that pays (`silo.p2p.convergence`);
* the room is about to be used up, or half of the time is gone: the guest is stopped now, since that is what stops Q
  from growing;
* Q does not fit into the link any more, or no target has accepted: the group goes to the store instead, to be
  resumed elsewhere, while that still fits;
* neither fits: whichever is nearer, and the plan says by how much it is late. It never pretends.

When the rest is uploaded *before* the guest is stopped (an evacuation to the store, a hibernation, the policy
``durable_before_switch``) the guest may write no faster than half of what the store takes: then each upload is at most
half of the one before. That is the throttle. A switchover to a target needs none, since it stops the guest
on one side and lets it run on the other at once.
"""

from __future__ import annotations

import enum

import attrs

from silo.p2p.convergence import RoundSummary, pays_off
from silo.p2p.meter import Meter

__all__ = ["ASSUMED_BPS", "Action", "Budget", "Capacity", "Plan", "Sight"]

SHARE = 0.75
"""Of what a carrier has shown: what one may count on for the rest of the time."""
PAUSE_S = 2.0
"""Kept free for the switchover itself; less when the whole notice is short."""
REACTION_S = 1.0
"""From looking to acting, with some room: two looks, and a round that must be brought to an end."""
ASSUMED_BPS = 12.5e6
"""A carrier that has shown nothing yet: 100 Mbit/s."""
FLOOR_BPS = float(1 << 20)
"""No guest is slowed further than this: it could not even write its logs."""


class Action(enum.Enum):
    """What follows."""

    COPY = "go on"
    ANOTHER_ROUND = "another round"
    SWITCH = "stop the guest"
    STORE = "go to the store instead"


@attrs.frozen
class Plan:
    """A decision, and why."""

    action: Action
    reason: str = ""
    fits: int | None = None
    """Bytes that can still be carried before the deadline, after a switchover now; ``None`` without a deadline."""
    late_by: int = 0
    """Bytes that will not have been carried by then."""
    write_bps: float | None = None
    """The guest's limit from now on."""


@attrs.frozen(kw_only=True)
class Sight:
    """What is known at one moment. Sizes in bytes, rates in bytes per second, ``None`` for not measured yet."""

    now: float
    only_here: int
    """What would have to be carried after a switchover now."""
    unsynced: int | None = None
    """What no commit covers; ``None`` without a store, or when the policy forbids going there."""
    link_bps: float | None = None
    store_bps: float | None = None
    write_bps: float = 0.0
    """How fast the guest makes chunks dirty."""
    round: int = 0
    """0 while no target has accepted."""
    is_link_up: bool = True
    summary: RoundSummary | None = None
    """How the round went that has just ended."""


@attrs.frozen(kw_only=True)
class Budget:
    """See the module. Times are `Clock.monotonic` seconds."""

    started: float
    deadline: float | None
    rounds_max: int
    switch_size: int
    switch_s: float
    may_throttle: bool = True

    @property
    def pause_s(self) -> float:
        """What is kept free for a switchover."""
        return min(PAUSE_S, self._notice_s / 8)

    @property
    def _notice_s(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - self.started

    def fits(self, rate_bps: float | None, now: float) -> int | None:
        """How many bytes can be carried after a switchover now; ``None`` without a deadline."""
        if self.deadline is None:
            return None
        rate = ASSUMED_BPS if rate_bps is None else rate_bps
        return int(SHARE * rate * max(0.0, self.deadline - now - self.pause_s))

    def _can_wait(self, size: int, write_bps: float, rate_bps: float | None, now: float) -> bool:
        """Whether what must be carried still fits when it is looked at again."""
        fits = self.fits(rate_bps, now + REACTION_S)
        return fits is None or size + write_bps * REACTION_S < fits

    def hot_size(self, sight: Sight, most: int) -> int:
        """How much to send of what the store has, too: half of the room beside what must be carried."""
        fits = self.fits(sight.link_bps, sight.now)
        return most if fits is None else max(0, min(most, (fits - sight.only_here) // 2))

    # ---- to a target ------------------------------------------------------------------------------------

    def plan(self, sight: Sight) -> Plan:
        """What follows, on the way to a target."""
        if sight.round == 0 or not sight.is_link_up:
            return self._plan_without_link(sight)
        fits = self.fits(sight.link_bps, sight.now)
        elapsed_s = sight.now - self.started
        if fits is not None and (sight.link_bps is not None or elapsed_s >= self._notice_s / 4):
            if sight.only_here > fits:
                return self._plan_too_slow(sight, fits)
            if not self._can_wait(sight.only_here, sight.write_bps, sight.link_bps, sight.now):
                return Plan(Action.SWITCH, "only as much time is left as the rest needs", fits)
            if elapsed_s >= self._notice_s / 2:
                return Plan(Action.SWITCH, "half of the time is gone", fits)
        if sight.summary is None:
            return Plan(Action.COPY, fits=fits)
        again, why = pays_off(
            sight.summary,
            rounds_max=self.rounds_max,
            switch_size=self.switch_size,
            switch_s=self.switch_s,
        )
        return Plan(Action.ANOTHER_ROUND if again else Action.SWITCH, why, fits)

    def _plan_without_link(self, sight: Sight) -> Plan:
        """Wait for a target, for as long as the store can still take everything afterwards."""
        if self.deadline is None or sight.unsynced is None:
            return Plan(Action.COPY)
        fits = self.fits(sight.store_bps, sight.now) or 0
        what = "the link is down" if sight.round else "no target has accepted"
        if not self._can_wait(sight.unsynced, sight.write_bps, sight.store_bps, sight.now):
            late_by = max(0, sight.unsynced - fits)
            return Plan(Action.STORE, f"{what}, and the store needs the rest of the time", fits, late_by)
        if sight.now - self.started >= self._notice_s / 2:
            return Plan(Action.STORE, f"{what}, and half of the time is gone", fits)
        return Plan(Action.COPY, what, fits)

    def _plan_too_slow(self, sight: Sight, fits: int) -> Plan:
        """Not everything fits into the link: the store, if that is better; else stop the guest at once."""
        late_by = sight.only_here - fits
        if sight.unsynced is not None:
            late_there = max(0, sight.unsynced - (self.fits(sight.store_bps, sight.now) or 0))
            # A store that has shown nothing must not be preferred to a link that has.
            if sight.store_bps is not None and late_there < late_by:
                return Plan(Action.STORE, "the link is too slow", fits, late_there)
        return Plan(Action.SWITCH, "not everything fits into the time that is left", fits, late_by)

    # ---- to the store -----------------------------------------------------------------------------------

    def plan_store(self, sight: Sight) -> Plan:
        """What follows, on the way to the store: upload again while the guest runs, or stop it for the rest."""
        unsynced = sight.unsynced or 0
        fits = self.fits(sight.store_bps, sight.now)
        rate = sight.store_bps or ASSUMED_BPS
        limit = None
        if fits is not None:
            if self.may_throttle and sight.write_bps > rate / 2:
                limit = max(FLOOR_BPS, rate / 2)
            late_by = max(0, unsynced - fits)
            write_bps = min(sight.write_bps, limit or sight.write_bps)
            if not self._can_wait(unsynced, write_bps, sight.store_bps, sight.now):
                why = (
                    "only as much time is left as the rest needs" if not late_by else "the store is too slow"
                )
                return Plan(Action.SWITCH, why, fits, late_by, limit)
        if unsynced <= max(self.switch_size, int((sight.store_bps or 0) * self.switch_s)):
            return Plan(Action.SWITCH, "little is left", fits, write_bps=limit)
        if sight.summary is None:
            return Plan(Action.COPY, fits=fits, write_bps=limit)
        again, why = pays_off(
            sight.summary,
            rounds_max=self.rounds_max,
            switch_size=self.switch_size,
            switch_s=self.switch_s,
        )
        return Plan(Action.ANOTHER_ROUND if again else Action.SWITCH, why, fits, write_bps=limit)


class Capacity:
    """What a carrier takes when it is given enough: the rate of the times in which it was busy throughout.

    A short or idle time says nothing of it, so there is no rate before it has carried a megabyte in earnest.
    """

    ENOUGH = 1 << 20
    ENOUGH_S = 0.2
    MEMORY_S = 5.0

    def __init__(self) -> None:
        self._size = 0.0
        self._time_s = 0.0
        self._last: tuple[float, int] | None = None

    def look(self, now: float, total: int, *, is_busy: bool) -> None:
        """So much has been carried in all up to now; ``is_busy``: and there is more to be carried."""
        if self._last is not None and is_busy and now > self._last[0]:
            elapsed_s = now - self._last[0]
            keeps = self.MEMORY_S / (self.MEMORY_S + elapsed_s)
            self._size = self._size * keeps + (total - self._last[1])
            self._time_s = self._time_s * keeps + elapsed_s
        self._last = (now, total) if is_busy else None

    @property
    def rate_bps(self) -> float | None:
        """Bytes per second; ``None`` while too little is known."""
        if self._time_s < self.ENOUGH_S or (self._size < self.ENOUGH and self._time_s < self.MEMORY_S / 2):
            return None
        return max(self._size / self._time_s, 1.0)


class Growth:
    """How fast a count has grown lately that starts again from 0 now and then."""

    def __init__(self) -> None:
        self._meter = Meter()
        self._last = 0

    def look(self, now: float, count: int) -> None:
        """The count as of now."""
        self._meter.add(max(0, count - self._last), now)
        self._last = count

    def restart(self) -> None:
        """The count is 0 again."""
        self._last = 0

    def rate_bps(self, now: float) -> float:
        """Per second, over the last three seconds."""
        return self._meter.rate_bps(now)
