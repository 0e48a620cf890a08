"""When another round of copying is worth it. Pure.

With r the rate at which the guest dirties chunks and B the rate of the link, each round leaves about r/B of what it
sent; it goes on as long as that pays. It never has to come to nothing: whatever is dirty at the switchover
follows afterwards, while the guest already runs on the target. The deadline is the business of `silo.p2p.budget`.
"""

from __future__ import annotations

import attrs

__all__ = ["RoundSummary", "pays_off"]


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


def pays_off(
    summary: RoundSummary, *, rounds_max: int, switch_size: int, switch_s: float
) -> tuple[bool, str]:
    """Whether another round is worth it, and why.

    It is not when little is left; or when the guest writes as fast as the link carries, so that rounds do not
    shrink (the rest follows after the switchover, when the guest's writes go to the target).
    """
    if summary.dirty_bytes <= max(switch_size, int(summary.rate_bps * switch_s)):
        return False, "little is left"
    if summary.round >= rounds_max:
        return False, f"{summary.round} rounds are enough"
    if summary.round > 1 and summary.dirty_bytes > 0.75 * summary.dirty_before:
        return False, "rounds do not shrink any more"
    return True, "rounds shrink"
