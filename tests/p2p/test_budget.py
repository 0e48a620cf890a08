"""What is done before a deadline: simulated notices of 30, 60 and 120 s over many links, disks and guests.

The model of the world is a few numbers: a link and a store with constant rates, a guest that makes chunks dirty at a
constant rate until all of its disk is, and a machine that is asked four times a second. What the plans say must
come true in it.
"""

from __future__ import annotations

import attrs
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from silo.p2p.budget import ASSUMED_BPS, FLOOR_BPS, SHARE, Action, Budget, Capacity, Growth, Plan, Sight
from silo.p2p.convergence import RoundSummary

MIB = 1 << 20
GIB = 1 << 30
LOOK_S = 0.25
MEASURED_S = 1.0
"""Until then a carrier has shown nothing."""

NOTICES = st.sampled_from([30.0, 60.0, 120.0])
RATES = st.sampled_from([1e6, 12.5e6, 60e6, 125e6, 312e6, 1.25e9])
SIZES = st.integers(0, 64 * GIB)


def budget(notice_s: float | None, **options: bool) -> Budget:
    """From a notice at 0, with the numbers of the default settings."""
    return Budget(started=0.0, deadline=notice_s, rounds_max=12, switch_size=4 * MIB, switch_s=0.1, **options)


@attrs.define
class Leaving:
    """A group on its way to a target, in the model of the world."""

    budget: Budget
    disk: float
    unsynced: float
    link_bps: float
    store_bps: float
    write_bps: float
    now: float = 0.0
    round: int = 1
    written: float = 0.0
    before: float = 0.0
    round_left: float = 0.0

    def run(self) -> tuple[Plan, float]:
        """Until the guest is stopped, or the store is wanted; the plan, and what only the source has then."""
        self.before = self.round_left = self.unsynced
        for _ in range(100_000):
            is_done = self.round_left <= 0
            summary = RoundSummary(
                round=self.round,
                dirty_bytes=int(self.written),
                dirty_before=int(self.before),
                rate_bps=self.link_bps,
            )
            only_here = self.round_left + self.written
            sight = Sight(
                now=self.now,
                only_here=int(only_here),
                unsynced=int(min(self.disk, self.unsynced)),
                link_bps=self.link_bps if self.now >= MEASURED_S else None,
                store_bps=self.store_bps if self.now >= MEASURED_S else None,
                write_bps=self.write_bps,
                round=self.round,
                summary=summary if is_done else None,
            )
            plan = self.budget.plan(sight)
            if plan.action in (Action.SWITCH, Action.STORE):
                return plan, only_here
            if plan.action is Action.ANOTHER_ROUND:
                self.round += 1
                self.before, self.round_left, self.written = self.written, self.written, 0.0
            self.now += LOOK_S
            self.round_left = max(0.0, self.round_left - self.link_bps * LOOK_S)
            self.written = min(self.disk, self.written + self.write_bps * LOOK_S)
        raise AssertionError("it went on for ever")


@given(NOTICES, SIZES, st.floats(0, 1), RATES, RATES, st.floats(0, 2))
@example(30.0, 16 * GIB, 0.02, 125e6, 125e6, 0.9)
@example(30.0, 64 * GIB, 1.0, 125e6, 1e6, 2.0)
def test_a_plan_that_is_not_late_comes_true(
    notice_s: float, disk: int, share: float, link_bps: float, store_bps: float, writes: float
) -> None:
    """What is to be carried after the switchover is there before the deadline, on three quarters of the link."""
    world = Leaving(budget(notice_s), disk, disk * share, link_bps, store_bps, writes * link_bps)
    plan, only_here = world.run()
    event(f"{plan.action.value}: {'late' if plan.late_by else 'in time'}")
    carrier_bps = link_bps if plan.action is Action.SWITCH else store_bps
    if plan.action is Action.STORE:
        only_here = min(only_here, world.unsynced)
    done_at = world.now + world.budget.pause_s + only_here / (SHARE * carrier_bps)
    if not plan.late_by:
        assert done_at <= notice_s + 1e-6
    else:
        assert done_at > notice_s - 1e-6
    assert world.now <= notice_s / 2 + LOOK_S


@given(NOTICES, SIZES, RATES, st.floats(0, 2))
def test_what_fits_with_room_to_spare_is_never_late(
    notice_s: float, disk: int, link_bps: float, writes: float
) -> None:
    """A group that the link can carry in a quarter of the time leaves in time, however its guest writes."""
    unsynced = min(disk, link_bps * SHARE * notice_s / 4)
    world = Leaving(budget(notice_s), disk, unsynced, link_bps, 1e6, writes * link_bps)
    plan, _ = world.run()
    assert plan.action is Action.SWITCH
    assert plan.late_by == 0


@given(NOTICES, RATES, st.floats(0, 3), st.floats(0, 1), st.booleans())
def test_on_the_way_to_the_store_the_guest_is_stopped_in_time(
    notice_s: float, store_bps: float, writes: float, share: float, may_throttle: bool
) -> None:
    """And slowed as long as it writes faster than half of what the store takes; never below the floor."""
    machine = budget(notice_s, may_throttle=may_throttle)
    capacity = SHARE * store_bps * (notice_s - machine.pause_s)
    unsynced, now, limit, count = share * capacity * 0.9, 0.0, None, 0
    uploading, fresh, before = unsynced, 0.0, unsynced
    while True:
        wants = writes * store_bps
        rate = wants if limit is None else min(wants, limit)
        summary = None
        if uploading <= 0:
            count += 1
            summary = RoundSummary(
                round=count, dirty_bytes=int(fresh), dirty_before=int(before), rate_bps=store_bps
            )
        sight = Sight(
            now=now,
            only_here=int(uploading + fresh),
            unsynced=int(uploading + fresh),
            store_bps=store_bps,
            write_bps=rate,
            summary=summary,
        )
        plan = machine.plan_store(sight)
        if plan.write_bps is not None:
            assert may_throttle
            assert plan.write_bps >= FLOOR_BPS
        if plan.action is Action.SWITCH:
            break
        if plan.action is Action.ANOTHER_ROUND:
            before, uploading, fresh = fresh, fresh, 0.0
        limit = plan.write_bps
        now += LOOK_S
        uploading = max(0.0, uploading - store_bps * LOOK_S)
        fresh += rate * LOOK_S
    done_at = now + machine.pause_s + (uploading + fresh) / (SHARE * store_bps)
    assert plan.late_by > 0 or done_at <= notice_s + 1e-6
    if writes * LOOK_S * 4 < SHARE * (1 - share * 0.9) * (notice_s - 2) / 2 and writes < 1:
        assert plan.late_by == 0
    assert now <= notice_s


def test_without_a_deadline_only_convergence_counts() -> None:
    """There is no hurry, no limit, and no way to the store."""
    machine = budget(None)
    sight = Sight(now=1e6, only_here=GIB, unsynced=GIB, link_bps=1e3, write_bps=1e9, round=1)
    assert machine.plan(sight) == Plan(Action.COPY)
    assert machine.plan(attrs.evolve(sight, round=0)) == Plan(Action.COPY)
    assert machine.plan_store(sight) == Plan(Action.COPY)
    assert machine.hot_size(sight, 7) == 7
    summary = RoundSummary(round=2, dirty_bytes=GIB, dirty_before=GIB, rate_bps=1e6)
    assert machine.plan(attrs.evolve(sight, summary=summary)).action is Action.SWITCH


def test_no_target_means_the_store_while_that_fits() -> None:
    """And without one there is nothing to do but to wait."""
    machine = budget(30.0)
    waiting = Sight(now=1.0, only_here=0, unsynced=100 * MIB, store_bps=20.0 * MIB)
    assert machine.plan(waiting).action is Action.COPY
    assert machine.plan(attrs.evolve(waiting, now=15.0)).action is Action.STORE
    large = attrs.evolve(waiting, unsynced=400 * MIB)
    plan = machine.plan(large)
    assert plan.action is Action.STORE
    assert plan.late_by == 0
    assert machine.plan(attrs.evolve(large, unsynced=500 * MIB)).late_by > 0
    assert machine.plan(attrs.evolve(waiting, now=29.0, unsynced=None)).action is Action.COPY


def test_a_link_that_breaks_in_the_middle_leaves_time_for_the_store() -> None:
    """As when there never was one."""
    machine = budget(30.0)
    sight = Sight(now=8.0, only_here=GIB, unsynced=100 * MIB, store_bps=20.0 * MIB, round=2, is_link_up=False)
    assert machine.plan(sight) == Plan(Action.COPY, "the link is down", machine.fits(20.0 * MIB, 8.0))
    assert machine.plan(attrs.evolve(sight, now=20.0)).action is Action.STORE


def test_a_slow_link_loses_to_the_store() -> None:
    """But only to one that has shown to be faster."""
    machine = budget(60.0)
    sight = Sight(now=5.0, only_here=GIB, unsynced=GIB, link_bps=1e6, store_bps=100e6, round=1)
    assert machine.plan(sight).action is Action.STORE
    for store_bps in (None, 0.5e6):
        plan = machine.plan(attrs.evolve(sight, store_bps=store_bps))
        assert plan.action is Action.SWITCH
        assert plan.late_by > 0


def test_hot_chunks_get_half_of_the_room() -> None:
    """Nothing when there is none."""
    machine = budget(30.0)
    sight = Sight(now=0.0, only_here=0, link_bps=100e6, round=1)
    room = SHARE * 100e6 * 28
    assert machine.hot_size(sight, GIB * 100) == int(room) // 2
    assert machine.hot_size(attrs.evolve(sight, only_here=int(room)), GIB) == 0
    assert machine.fits(None, 0.0) == int(SHARE * ASSUMED_BPS * 28)


def test_capacity_is_what_a_busy_carrier_takes() -> None:
    """Idle times do not count, and short ones say nothing."""
    capacity = Capacity()
    for tick in range(3):
        capacity.look(tick * 0.01, tick * 1000, is_busy=True)
    assert capacity.rate_bps is None
    capacity, total = Capacity(), 0
    for tick in range(100):
        is_busy = tick % 10 < 6
        capacity.look(100 + tick * 0.25, total, is_busy=is_busy)
        total += 5 * MIB if is_busy else 0
    assert capacity.rate_bps == pytest.approx(20 * MIB, rel=0.02)


def test_growth_survives_that_its_count_starts_again() -> None:
    """Twice 10 in two seconds are 10 per second."""
    growth = Growth()
    for now, count in ((0.0, 0), (1.0, 10), (1.0, 0), (2.0, 10)):
        growth.look(now, count)
    assert growth.rate_bps(2.0) == pytest.approx(10.0, rel=0.1)
