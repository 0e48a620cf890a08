"""When the guest is stopped."""

from __future__ import annotations

import attrs
import pytest

from silo.p2p.convergence import Decision, RoundSummary, decide, must_switch

MIB = 1 << 20
BUSY = RoundSummary(round=3, dirty_bytes=100 * MIB, dirty_before=400 * MIB, rate_bps=100 * MIB)


def decided(summary: RoundSummary) -> Decision:
    return decide(summary, rounds_max=12, switch_size=4 * MIB, switch_s=0.1)


@pytest.mark.parametrize(
    ("change", "decision"),
    [
        ({}, Decision.ANOTHER_ROUND),
        ({"dirty_bytes": 4 * MIB}, Decision.SWITCH),
        ({"dirty_bytes": 10 * MIB}, Decision.SWITCH),
        ({"dirty_bytes": 11 * MIB}, Decision.ANOTHER_ROUND),
        ({"round": 12}, Decision.SWITCH),
        ({"dirty_before": 120 * MIB}, Decision.SWITCH),
        ({"dirty_before": 120 * MIB, "round": 1}, Decision.ANOTHER_ROUND),
        ({"time_left_s": 100.0}, Decision.ANOTHER_ROUND),
        ({"time_left_s": 3.0}, Decision.SWITCH),
        ({"time_left_s": -1.0}, Decision.SWITCH),
        ({"rate_bps": 0.0}, Decision.ANOTHER_ROUND),
    ],
)
def test_another_round_only_when_it_pays(change, decision):
    """Little left, no convergence, too many rounds or too little time end pre-copy; nothing else does."""
    assert decided(attrs.evolve(BUSY, **change)) is decision


def test_the_deadline_leaves_room_for_what_only_we_have():
    """The switchover comes while the link can still carry the rest at three quarters of its rate."""
    assert not must_switch(300 * MIB, 100 * MIB, None)
    assert not must_switch(300 * MIB, 100 * MIB, 6.1)
    assert must_switch(300 * MIB, 100 * MIB, 6.0)
    assert must_switch(0, 0.0, 1.9)
