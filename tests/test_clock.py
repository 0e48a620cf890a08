"""The real clock."""

from __future__ import annotations

import asyncio
import time
import uuid

import pytest

from silo.abc import Clock
from silo.clock import boot_id


def test_it_is_a_clock(clock):
    """The port's check finds every method."""
    assert isinstance(clock, Clock)


async def test_monotonic_is_the_loop_time(clock):
    """Deadlines may be compared with the event loop's time, because both have one scale."""
    before = clock.monotonic()
    between = asyncio.get_running_loop().time()
    assert before <= between <= clock.monotonic()


def test_boottime_counts_suspension_too(clock):
    """Time since boot is never less than the time that the machine was awake."""
    awake = clock.monotonic()
    assert clock.boottime() >= awake


def test_wall_is_posix_time(clock):
    """The calendar agrees with the system's."""
    assert clock.wall() == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("size", [0, 1, 16, 32])
def test_tokens_have_the_size_asked_for(clock, size):
    """A token is as long as asked for."""
    assert len(clock.token(size)) == size


def test_tokens_differ(clock):
    """No two tokens of sixteen bytes are equal."""
    assert len({clock.token(16) for _ in range(1000)}) == 1000


def test_boot_id_is_stable_and_well_formed():
    """The name of this boot is a UUID, and does not change while it lasts."""
    assert str(uuid.UUID(boot_id())) == boot_id()
