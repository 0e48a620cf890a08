"""When the source stops the guest: after which round of pre-copy the switchover comes. Pure.

With r the rate at which the guest dirties chunks and B the rate of the link, each round leaves about r/B of what it
sent; it goes on as long as that pays. It never has to come to nothing: whatever is dirty at the switchover
follows afterwards, while the guest already runs on the target. What must be watched is the deadline. Until it, the
link has to carry everything that only the source has, and that is smallest if the guest stops making more of it.
"""

from __future__ import annotations

import enum

import attrs

__all__ = ["Decision", "RoundSummary", "decide", "must_switch"]

SWITCHOVER_RESERVE_S = 2.0
"""Kept free for the switchover itself: suspending, flushing, claiming."""


class Decision(enum.Enum):
    """What follows a round of pre-copy."""

    ANOTHER_ROUND = "another round"
    SWITCH = "switch"


@attrs.frozen(kw_only=True)
class RoundSummary:
    """How a round went."""

    round: int
    dirty_bytes: int
    """Written during it, in whole chunks."""
    dirty_before: int
    """Written during the round before, or what there was at all."""
    rate_bps: float
    """What the link carries; 0 when nothing was sent."""
    time_left_s: float | None = None
    """Until the migration's deadline; ``None`` without one."""


def decide(summary: RoundSummary, *, rounds_max: int, switch_size: int, switch_s: float) -> Decision:
    """Whether another round is worth it.

    It is not when little is left; when the guest writes as fast as the link carries, so that rounds do not
    shrink (the rest follows after the switchover, when the guest's writes go to the target); or when what is
    left of the time is needed for what only the source has.
    """
    small = max(switch_size, int(summary.rate_bps * switch_s))
    if summary.dirty_bytes <= small or summary.round >= rounds_max:
        return Decision.SWITCH
    if summary.round > 1 and summary.dirty_bytes > 0.75 * summary.dirty_before:
        return Decision.SWITCH
    if must_switch(summary.dirty_bytes, summary.rate_bps, summary.time_left_s):
        return Decision.SWITCH
    return Decision.ANOTHER_ROUND


def must_switch(unique_bytes: int, rate_bps: float, time_left_s: float | None) -> bool:
    """The deadline is so near that only what nobody else has can still be carried: at three quarters of the
    rate that the link has shown."""
    if time_left_s is None:
        return False
    needed_s = unique_bytes / (0.75 * rate_bps) if rate_bps else 0.0
    return time_left_s - SWITCHOVER_RESERVE_S <= needed_s
