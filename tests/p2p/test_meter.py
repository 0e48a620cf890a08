"""Rates, and keeping to one."""

from __future__ import annotations

import pytest

from silo.p2p.meter import Meter, Pacer


def test_the_rate_is_that_of_the_last_seconds():
    """Old traffic does not count, and nothing is nothing."""
    meter = Meter()
    assert meter.rate_bps(0.0) == 0.0
    for tick in range(100):
        meter.add(1000, tick * 0.1)
    assert meter.rate_bps(9.9) == pytest.approx(10_000, rel=0.1)
    assert meter.total == 100_000
    for tick in range(100, 150):
        meter.add(100, tick * 0.1)
    assert meter.rate_bps(14.9) == pytest.approx(1000, rel=0.1)


def test_a_link_that_carries_nothing_has_no_rate():
    """Silence brings the rate down."""
    meter = Meter()
    meter.add(1000, 0.0)
    meter.add(1000, 1.0)
    assert meter.rate_bps(1.0) == pytest.approx(2000)
    assert meter.rate_bps(100.0) < 20


def test_pacing_keeps_to_the_rate():
    """Waiting as told, a megabyte at 100 kB/s takes ten seconds, however it is cut; without a limit, none."""
    for piece in (1000, 64_000, 500_000):
        pacer, now, sent = Pacer(100_000.0), 5.0, 0
        while sent < 1_000_000:
            sent += piece
            now += pacer.delay_s(piece, now)
        assert now - 5.0 == pytest.approx(sent / 100_000)
    assert Pacer(None).delay_s(1 << 40, 0.0) == 0.0


def test_pacing_does_not_save_up():
    """A pause does not allow a burst."""
    pacer = Pacer(1000.0)
    assert pacer.delay_s(1000, 0.0) == pytest.approx(1.0)
    assert pacer.delay_s(1000, 100.0) == pytest.approx(1.0)
