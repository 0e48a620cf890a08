"""Whether another round is worth it."""

from __future__ import annotations

import attrs
import pytest

from silo.p2p.convergence import RoundSummary, pays_off

MIB = 1 << 20
BUSY = RoundSummary(round=3, dirty_bytes=100 * MIB, dirty_before=400 * MIB, rate_bps=100 * MIB)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, True),
        ({"dirty_bytes": 4 * MIB}, False),
        ({"dirty_bytes": 10 * MIB}, False),
        ({"dirty_bytes": 11 * MIB}, True),
        ({"round": 12}, False),
        ({"dirty_before": 120 * MIB}, False),
        ({"dirty_before": 120 * MIB, "round": 1}, True),
        ({"rate_bps": 0.0}, True),
    ],
)
def test_another_round_only_when_it_pays(change: dict[str, float], *, again: bool) -> None:
    """Little left, no convergence or too many rounds end pre-copy; nothing else does."""
    summary = attrs.evolve(BUSY, **change)
    assert pays_off(summary, rounds_max=12, switch_size=4 * MIB, switch_s=0.1)[0] is again
