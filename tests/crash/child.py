"""A process that works until it is killed: ``python -m tests.crash.child <what> <path>``.

After each step that it may rely on, it prints the number of the step; the parent kills it at any moment and
looks at what it left.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import struct
import sys

from silo.chunkmap import SYNC_DIRTY, Residency
from silo.devices.file import FileDevice
from silo.devices.overlay_open import open_overlay
from silo.geometry import Geometry
from silo.statedir import StateDir

BLOCK = 4096
BLOCKS = 64
GEOMETRY = Geometry(200 * 4096, 4096)


def states_of(step: int) -> bytes:
    """A map that says which step it is from: its bits, chunk by chunk, and again in the other half."""
    half = bytes(Residency.PRESENT if step >> bit & 1 else Residency.ABSENT_STORE for bit in range(100))
    return half * 2


def step_of(states: bytes) -> int:
    """The reverse of `states_of`; raises when the halves differ."""
    first, second = (
        sum((state & 7 == Residency.PRESENT) << bit for bit, state in enumerate(half))
        for half in (states[:100], states[100:])
    )
    if first != second:
        raise ValueError(f"a map from two steps: {first} and {second}")
    return first


def record_of(step: int) -> bytes:
    """A record that says which step it is from and is large enough to be torn."""
    return struct.pack("<Q", step) * 20_000


def stamp(block: int, step: int) -> bytes:
    """A block that says where it belongs and which step it is from."""
    return struct.pack("<QQ", block, step) * (BLOCK // 16)


def done(step: int) -> None:
    os.write(1, b"%d\n" % step)


async def checkpoints(path: str) -> None:
    """Step by step: the map, then its checkpoint."""
    state = StateDir(path, boot="the boot of the child")
    group = await state.open_group("vm1")
    volume = await group.open_volume("disk", GEOMETRY, states_of(0))
    for step in itertools.count(step_of(bytes(volume.buffer)) + 1):
        volume.buffer[:] = states_of(step)
        await volume.checkpoint(bytes(volume.buffer))
        done(step)


async def maps(path: str) -> None:
    """Step by step: one dirty bit after the other, and no checkpoint at all."""
    state = StateDir(path, boot="the boot of the child")
    group = await state.open_group("vm1")
    volume = await group.open_volume("disk", GEOMETRY, states_of(0))
    for step in range(GEOMETRY.chunk_count):
        volume.buffer[step] |= SYNC_DIRTY
        done(step)
    await asyncio.Event().wait()


async def records(path: str) -> None:
    """Step by step: one record, replaced again and again."""
    state = StateDir(path)
    group = await state.open_group("vm1")
    for step in itertools.count(1):
        await group.write_record("offer", record_of(step))
        done(step)


async def blocks(path: str) -> None:
    """Step by step: one block of a file device, in turn at both speeds."""
    device = FileDevice(path, BLOCKS * BLOCK)
    for step in itertools.count(1):
        block = step % BLOCKS
        if step % 2 or not device.write_nowait(block * BLOCK, stamp(block, step)):
            await device.write(block * BLOCK, stamp(block, step))
        done(step)


def image() -> bytes:
    """What is below the overlay: every block says that no step has touched it."""
    return b"".join(struct.pack("<QQ", block, 1 << 40) * (BLOCK // 16) for block in range(BLOCKS))


def block_of(step: int) -> tuple[int, bytes]:
    """Which block a step changes, and to what: each third step zeroes one."""
    block = step * 37 % BLOCKS
    return block, stamp(block, step) if step % 3 else bytes(BLOCK)


async def overlay(path: str, *, flush: bool) -> None:
    """Step by step: one block of an overlay, written or zeroed, in turn at both speeds."""
    device = await open_overlay(f"{path}/disk.overlay", f"{path}/golden.img", cell_size=4 * BLOCK)
    for step in itertools.count(1):
        block, content = block_of(step)
        offset, fast = block * BLOCK, step % 2
        if any(content):
            if not (fast and device.write_nowait(offset, content)):
                await device.write(offset, content)
        elif not (fast and device.zero_nowait(offset, BLOCK)):
            await device.zero(offset, BLOCK)
        if flush:
            await device.flush()
        done(step)


if __name__ == "__main__":
    what = {
        "checkpoints": checkpoints,
        "maps": maps,
        "records": records,
        "blocks": blocks,
        "overlay": functools.partial(overlay, flush=False),
        "flushed-overlay": functools.partial(overlay, flush=True),
    }[sys.argv[1]]
    asyncio.run(what(sys.argv[2]))
