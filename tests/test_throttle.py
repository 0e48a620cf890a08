"""Guests' writes that are slowed down: by how much, what passes freely, and that it costs nothing when it is off."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.errors import InvalidRequestError
from silo.geometry import Geometry
from silo.group import Group
from silo.testing.loop import SimulatedClock
from silo.throttle import BURST_S, Bucket, Throttle
from tests.support.simulated import simulated
from tests.support.volumes import CHUNK, make_volume

CHUNKS = 64


@given(
    st.floats(1e3, 1e9),
    st.lists(st.tuples(st.integers(1, 1 << 22), st.floats(0, 2)), min_size=1, max_size=50),
)
def test_a_bucket_keeps_to_its_rate(rate_bps: float, takes: list[tuple[int, float]]) -> None:
    """Over any time: no more than the rate allows, a short burst, and the last one."""
    bucket, now, taken = Bucket(), 0.0, 0
    for size, pause_s in takes:
        now += pause_s
        now += bucket.delay_s(rate_bps, now)
        assert bucket.delay_s(rate_bps, now) == pytest.approx(0.0, abs=1e-6)
        assert taken <= rate_bps * (now + BURST_S) * (1 + 1e-9) + 1
        bucket.take(size)
        taken += size


@simulated
async def test_writes_that_make_chunks_dirty_are_slowed_to_the_limit(clock: SimulatedClock) -> None:
    """And those to dirty chunks pass, as do reads."""
    group = Group("vm1", clock)
    volume = group.add("disk", MemoryDevice(CHUNKS * CHUNK), Geometry(CHUNKS * CHUNK, CHUNK))
    assert volume.write_nowait(0, b"before")
    group.throttle.limit("test", 4.0 * CHUNK)
    started = clock.monotonic()
    assert not volume.write_nowait(0, b"slow down")
    for chunk in range(CHUNKS):
        await volume.write(chunk * CHUNK, b"first")
    took_s = clock.monotonic() - started
    assert CHUNKS / 4 - 2 < took_s < CHUNKS / 4 + 1
    for chunk in range(CHUNKS):
        await volume.write(chunk * CHUNK + 100, b"second")
        await volume.read(chunk * CHUNK, 10)
    assert clock.monotonic() == started + took_s
    assert group.throttle.waited_s == pytest.approx(took_s, abs=0.1)
    group.throttle.limit("test", None)
    assert volume.write_nowait(0, b"as fast as ever")


@simulated
async def test_the_lowest_limit_counts_and_the_last_one_sets_everybody_free(clock: SimulatedClock) -> None:
    """Whoever waits when a limit changes goes on at the new one."""
    group, volume = make_volume(MemoryDevice(CHUNKS * CHUNK), group=Group("vm1", clock))
    started = clock.monotonic()
    group.throttle.limit("one", 2.0 * CHUNK)
    group.throttle.limit("other", 1.0 * CHUNK)
    assert group.throttle.rate_bps == CHUNK
    assert group.throttle.reasons == ("one", "other")
    group.throttle.limit("other", 1e-6)

    async def write(chunk: int) -> None:
        await volume.write(chunk * CHUNK, b"content")

    async with asyncio.TaskGroup() as tasks:
        writes = [tasks.create_task(write(chunk)) for chunk in range(4)]
        await asyncio.sleep(5)
        waiting = [task for task in writes if not task.done()]
        assert len(waiting) == 3
        waiting[1].cancel()
        group.throttle.limit("one", None)
        await asyncio.sleep(5)
        assert not waiting[0].done()
        group.throttle.limit("other", None)
        await asyncio.wait(waiting)
        assert clock.monotonic() == started + 10
    assert volume.write_nowait(0, b"free")


async def test_a_read_only_volume_stays_so() -> None:
    """Also when a limit comes and goes."""
    group, volume = make_volume(MemoryDevice(CHUNKS * CHUNK), read_only=True)
    group.throttle.limit("test", 1e6)
    group.throttle.limit("test", None)
    assert not volume.write_nowait(0, b"no")
    with pytest.raises(InvalidRequestError, match="read-only"):
        await volume.write(0, b"no")


def test_a_limit_must_let_something_pass() -> None:
    """0 would stop the guest for ever."""
    with pytest.raises(InvalidRequestError, match="cannot be limited"):
        Throttle(SystemClock(), lambda: None).limit("test", 0)
