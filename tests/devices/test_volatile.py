"""The device with a write cache, and what a power loss leaves of it."""

from __future__ import annotations

import asyncio
import random
import struct

import pytest

from silo.abc import Clock
from silo.devices.delayed import DelayedDevice, Delays
from silo.devices.volatile import VolatileDevice
from silo.testing.check_device import check_device
from silo.testing.loop import run_simulated

SIZE = 1 << 20
BLOCK = 512


async def test_contract() -> None:
    async def make() -> VolatileDevice:
        return VolatileDevice(SIZE)

    await check_device(make)


async def images(device: VolatileDevice, length: int, count: int = 200) -> set[bytes]:
    """The distinct beginnings of ``count`` images that a power loss could leave."""
    found = set()
    for seed in range(count):
        survivor = await device.power_loss(random.Random(seed).random)
        found.add(bytes(survivor.read_nowait(0, length)))
        await survivor.aclose()
    return found


async def test_what_was_flushed_survives_and_the_rest_may() -> None:
    device = VolatileDevice(SIZE)
    await device.write(0, b"a" * BLOCK)
    await device.flush()
    assert await images(device, BLOCK) == {b"a" * BLOCK}
    await device.write(0, b"b" * BLOCK)
    await device.zero(0, BLOCK)
    assert device.unsynced == 2
    assert await images(device, BLOCK) == {b"a" * BLOCK, b"b" * BLOCK, bytes(BLOCK)}
    await device.flush()
    assert device.unsynced == 0
    assert await images(device, BLOCK) == {bytes(BLOCK)}
    await device.aclose()


async def test_writes_land_in_any_order_and_in_part_but_no_block_is_torn() -> None:
    device = VolatileDevice(SIZE)
    await device.write(0, b"a" * (2 * BLOCK))
    await device.write(BLOCK, b"b" * BLOCK)
    blocks = {(image[:BLOCK], image[BLOCK:]) for image in await images(device, 2 * BLOCK)}
    contents = {bytes([byte]) * BLOCK for byte in b"\0ab"}
    assert blocks == {(first, second) for first in contents - {b"b" * BLOCK} for second in contents}
    await device.aclose()


async def test_two_writes_into_one_block_land_one_after_the_other() -> None:
    """The cache holds whole blocks, so the second half never arrives without the first."""
    device = VolatileDevice(SIZE)
    await device.write(0, b"a" * 256)
    await device.write(256, b"b" * 256)
    empty = bytes(256)
    assert await images(device, BLOCK) == {empty * 2, b"a" * 256 + empty, b"a" * 256 + b"b" * 256}
    await device.aclose()


async def test_the_same_seed_leaves_the_same_image_and_the_device_goes_on() -> None:
    device = VolatileDevice(SIZE)
    for offset in range(0, 100 * BLOCK, BLOCK):
        await device.write(offset, random.Random(offset).randbytes(BLOCK))
    first = await device.power_loss(random.Random(5).random)
    second = await device.power_loss(random.Random(5).random)
    assert await first.read(0, 100 * BLOCK) == await second.read(0, 100 * BLOCK)
    assert await device.read(0, BLOCK) == random.Random(0).randbytes(BLOCK)
    for closing in (first, second, device):
        await closing.aclose()


def stamp(block: int, sequence: int) -> bytes:
    """One block that says where it belongs and which write it came from."""
    return struct.pack("<QQ", block, sequence) * (BLOCK // 16)


@pytest.mark.parametrize("seed", range(20))
def test_stamped_blocks_survive_a_chain_of_power_losses(seed: int) -> None:
    """Whenever the power fails, every block holds its last flushed stamp or a later one, whole."""
    blocks = 16
    delays = Delays(read_s=0.001, write_s=0.01, flush_s=0.02, jitter=0.9, decline=0.5)

    async def scenario(clock: Clock) -> None:
        draw = random.Random(seed)
        volatile = VolatileDevice(SIZE)
        written, flushed, ended = [0] * blocks, [0] * blocks, [0] * blocks
        for _ in range(5):
            device = DelayedDevice(volatile, delays, draw.random)

            async def write(block: int, device: DelayedDevice = device) -> None:
                # One writer per block, so its writes are in order.
                while True:
                    written[block] += 1
                    await device.write(block * BLOCK, stamp(block, written[block]))
                    ended[block] = written[block]

            async def flush(device: DelayedDevice = device) -> None:
                while True:
                    covered = list(ended)
                    await device.flush()
                    flushed[:] = covered
                    await asyncio.sleep(draw.random() * 0.05)

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(write(block)) for block in range(blocks)]
                tasks.append(group.create_task(flush()))
                await asyncio.sleep(draw.random())
                survivor = await volatile.power_loss(draw.random)
                for task in tasks:
                    task.cancel()
            await device.aclose()
            for block in range(blocks):
                found = await survivor.read(block * BLOCK, BLOCK)
                number, sequence = struct.unpack_from("<QQ", found)
                assert found == (stamp(block, sequence) if sequence else bytes(BLOCK))
                assert number == (block if sequence else 0)
                assert flushed[block] <= sequence <= written[block]
                flushed[block] = ended[block] = sequence
            volatile = survivor
        await volatile.aclose()

    run_simulated(scenario, seed=seed)
