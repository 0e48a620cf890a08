"""The layer that takes its time, on virtual time."""

from __future__ import annotations

import asyncio
import random

import pytest

from silo.abc import Clock
from silo.devices.delayed import DelayedDevice, Delays
from silo.devices.memory import MemoryDevice
from silo.testing.check_device import check_device
from silo.testing.loop import run_simulated

SIZE = 1 << 20


@pytest.mark.parametrize("decline", [0.0, 0.5, 1.0])
def test_contract(decline: float) -> None:
    delays = Delays(read_s=0.001, write_s=0.002, flush_s=0.1, jitter=0.5, decline=decline)

    async def scenario(clock: Clock) -> None:
        chance = random.Random(1).random

        async def make() -> DelayedDevice:
            return DelayedDevice(MemoryDevice(SIZE), delays, chance)

        await check_device(make)

    run_simulated(scenario, seed=1)


def test_waits_are_as_long_as_they_were_set() -> None:
    async def scenario(clock: Clock) -> list[float]:
        delays = Delays(read_s=1, write_s=10, flush_s=100)
        device = DelayedDevice(MemoryDevice(SIZE), delays, random.Random(1).random)
        times = []
        for call in (device.read(0, 1), device.write(0, b"x"), device.zero(0, 1), device.flush()):
            start = clock.monotonic()
            await call
            times.append(round(clock.monotonic() - start, 6))
        await device.aclose()
        return times

    assert run_simulated(scenario, seed=1) == [1, 10, 10, 100]


def test_jitter_stays_in_its_share_and_comes_from_the_seed() -> None:
    async def scenario(clock: Clock) -> list[float]:
        device = DelayedDevice(MemoryDevice(SIZE), Delays(read_s=1, jitter=0.25), random.Random(7).random)
        times = []
        for _ in range(50):
            start = clock.monotonic()
            await device.read(0, 1)
            times.append(round(clock.monotonic() - start, 6))
        await device.aclose()
        return times

    times = run_simulated(scenario, seed=1)
    assert all(0.75 <= time <= 1.25 for time in times)
    assert len(set(times)) > 40
    assert run_simulated(scenario, seed=1) == times


def test_a_write_takes_effect_halfway() -> None:
    async def scenario(clock: Clock) -> list[bytes]:
        memory = MemoryDevice(SIZE)
        device = DelayedDevice(memory, Delays(write_s=2), random.Random(1).random)
        seen = []
        async with asyncio.TaskGroup() as group:
            group.create_task(device.write(0, b"x"))
            for _ in range(2):
                await asyncio.sleep(0.75)
                seen.append(bytes(memory.read_nowait(0, 1)))
        await device.aclose()
        return seen

    assert run_simulated(scenario, seed=1) == [b"\0", b"x"]


async def test_how_often_the_fast_path_is_refused() -> None:
    device = DelayedDevice(MemoryDevice(SIZE), Delays(decline=0.5), random.Random(3).random)
    done = sum(device.write_nowait(0, b"x") for _ in range(1000))
    assert 400 < done < 600
    await device.aclose()
