"""A volume on a disk with a volatile cache, its map in a state directory, and the power failing again and again.

After each loss every block must hold its content as of the last flush that returned, or anything that was written to
it later: never something older, and never a mixture. The chunks that were absent come from a source that holds
what they had before anybody wrote to them. Cuts come and go, so that zeroed chunks wait for their punch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from silo.abc import Buffer, ChunkSource, Clock
from silo.checkpoint import Kept, decode_checkpoint, owner_tag
from silo.chunkmap import ChunkMap, Residency
from silo.devices.delayed import DelayedDevice, Delays
from silo.devices.volatile import VolatileDevice
from silo.errors import CorruptionError
from silo.geometry import Geometry
from silo.group import Group
from silo.statedir import StateDir
from silo.testing.loop import run_simulated
from silo.volume import Volume
from silo.volumestate import DurableState, Origin
from tests.support.seeds import seeds

pytestmark = [pytest.mark.crash, pytest.mark.sim]

BLOCK = 512
CHUNK = 4096
CHUNKS = 12
BLOCKS = CHUNKS * CHUNK // BLOCK
GEOMETRY = Geometry(CHUNKS * CHUNK, CHUNK)
LOSSES = 4
FRESH = bytes(Residency.ABSENT_STORE if chunk % 3 else Residency.ZERO for chunk in range(CHUNKS))


def content_of(version: int) -> bytes:
    """One block. Versions are never used twice; the negative ones are zeros."""
    return max(version, 0).to_bytes(8, "little") * (BLOCK // 8)


class Before(ChunkSource):
    """What the store holds: for each block of an absent chunk, the version whose number is 1 plus the block's."""

    async def fetch(self, volume: str, chunk: int, *, demand: bool) -> Buffer:
        await asyncio.sleep(0.003)
        first = chunk * CHUNK // BLOCK
        return b"".join(content_of(1 + block) for block in range(first, first + CHUNK // BLOCK))


class History:
    """Which versions each block may hold: the last one known to be durable, and all that were begun since."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1000)
        self.possible = [
            [1 + block] if FRESH[block * BLOCK // CHUNK] == Residency.ABSENT_STORE else [-1]
            for block in range(BLOCKS)
        ]
        self.ended = [versions[-1] for versions in self.possible]

    def copy(self) -> History:
        other = History()
        other._numbers = self._numbers
        other.possible, other.ended = [list(versions) for versions in self.possible], list(self.ended)
        return other

    def begin(self, first: int, count: int, *, zero: bool) -> list[int]:
        versions = [-next(self._numbers) if zero else next(self._numbers) for _ in range(count)]
        for block, version in enumerate(versions, first):
            self.possible[block].append(version)
        return versions

    def end(self, first: int, versions: list[int]) -> None:
        self.ended[first : first + len(versions)] = versions

    def flushed(self, covered: list[int]) -> None:
        """A flush returned, and these versions had ended when it was asked for."""
        for versions, version in zip(self.possible, covered, strict=True):
            del versions[: versions.index(version)]

    def restart(self, block: int, found: Buffer) -> None:
        """The power is back, and this is what the block holds: it must be possible, and counts from here on."""
        fits = [version for version in self.possible[block] if content_of(version) == bytes(found)]
        assert fits, f"block {block} holds {bytes(found[:8]).hex()}, which is none of {self.possible[block]}"
        self.possible[block] = fits[-1:]
        self.ended[block] = fits[-1]


class Guest:
    """Writes and zeroes blocks of its own share, one request at a time, and reads them back."""

    def __init__(self, volume: Volume, history: History, draw: random.Random, share: range) -> None:
        self.volume, self.history, self.draw, self.share = volume, history, draw, share

    async def run(self) -> None:
        while True:
            first = self.draw.choice(self.share)
            count = self.draw.randrange(1, min(10, self.share.stop - first) + 1)
            action = self.draw.randrange(8)
            if action < 4:
                versions = self.history.begin(first, count, zero=False)
                await self.volume.write(first * BLOCK, b"".join(map(content_of, versions)))
                self.history.end(first, versions)
            elif action < 6:
                versions = self.history.begin(first, count, zero=True)
                await self.volume.zero(first * BLOCK, count * BLOCK)
                self.history.end(first, versions)
            else:
                found = await self.volume.read(first * BLOCK, count * BLOCK)
                for block in range(first, first + count):
                    start = (block - first) * BLOCK
                    assert bytes(found[start : start + BLOCK]) == content_of(self.history.ended[block])
            await asyncio.sleep(self.draw.random() * 0.01)


async def flush_now_and_then(volume: Volume, history: History, draw: random.Random) -> None:
    while True:
        await asyncio.sleep(draw.random() * 0.1)
        covered = list(history.ended)
        await volume.flush()
        history.flushed(covered)


async def cut_now_and_then(group: Group, draw: random.Random) -> None:
    while True:
        cut = group.take()
        try:
            for part in cut.volumes.values():
                for chunk in part.data:
                    await part.read(int(chunk))
                    await asyncio.sleep(draw.random() * 0.02)
                    part.release(int(chunk))
        finally:
            cut.abandon()
        await asyncio.sleep(draw.random() * 0.05)


async def life(volume: Volume, group: Group, history: History, draw: random.Random) -> None:
    """Guests, flushes and cuts until the power fails."""
    shares = [range(first, min(first + 24, BLOCKS)) for first in range(0, BLOCKS, 24)]
    with contextlib.suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as tasks:
            for share in shares:
                tasks.create_task(Guest(volume, history, draw, share).run())
            tasks.create_task(flush_now_and_then(volume, history, draw))
            tasks.create_task(cut_now_and_then(group, draw))


async def one_life(
    clock: Clock, state: StateDir, disk: VolatileDevice, history: History, draw: random.Random, after: Path
) -> tuple[VolatileDevice, History]:
    """Open what is there, check it, work, lose the power.

    Returns the disk that is left and what it may hold. What is left of the state directory is at ``after``.
    """
    kept = await (await state.open_group("vm1")).open_volume("disk", GEOMETRY, FRESH)
    delays = Delays(read_s=0.002, write_s=0.004, flush_s=0.01, jitter=0.9, decline=0.5)
    group = Group("vm1", clock)
    chunks = ChunkMap(kept.buffer, CHUNKS)
    volume = group.add("disk", DelayedDevice(disk, delays, draw.random), GEOMETRY, chunks=chunks, keeper=kept)
    volume.set_source(Residency.ABSENT_STORE, Before())
    if kept.origin is Origin.CHECKPOINT:
        for block in range(BLOCKS):
            history.restart(block, await volume.read(block * BLOCK, BLOCK))
    async with asyncio.TaskGroup() as tasks:
        living = tasks.create_task(life(volume, group, history, draw))
        await asyncio.sleep(0.05 + draw.random())
        # The instant of the loss. Making the image awaits nothing that waits, so these lines are one step.
        survivor, possible = await disk.power_loss(draw.random), history.copy()
        shutil.copytree(state.path, after)
        living.cancel()
    tear_older_checkpoint(after / "groups" / "vm1" / "volumes" / "disk", draw)
    await group.aclose()
    return survivor, possible


def tear_older_checkpoint(folder: Path, draw: random.Random) -> None:
    """The older of the two may have been in the middle of being overwritten."""
    sequences = {}
    for name in ("checkpoint.a", "checkpoint.b"):
        with contextlib.suppress(CorruptionError):
            data = (folder / name).read_bytes()
            sequences[name] = decode_checkpoint(data, owner_tag("vm1", "disk")).sequence
    if len(sequences) == 2 and draw.random() < 0.5:
        os.truncate(folder / min(sequences, key=sequences.__getitem__), draw.randrange(100))


def lives(seed: int, tmp_path: Path) -> None:
    """One disk, and the power failing again and again."""

    async def scenario(clock: Clock) -> None:
        draw = random.Random(seed)
        disk, history = VolatileDevice(GEOMETRY.size, block_size=BLOCK), History()
        for loss in range(LOSSES):
            path = tmp_path / f"{seed}-{loss}"
            async with contextlib.aclosing(StateDir(path, boot=f"boot {loss}")) as state:
                disk, history = await one_life(
                    clock, state, disk, history, draw, tmp_path / f"{seed}-{loss + 1}"
                )

    run_simulated(scenario, seed=seed)


@pytest.mark.parametrize("seed", seeds(20))
def test_nothing_that_was_flushed_is_lost(seed: int, tmp_path: Path) -> None:
    lives(seed, tmp_path)


async def forgetful(self: DurableState, states: bytes) -> None:
    """A checkpoint that is not written."""


def believes_maps(kept: np.ndarray) -> np.ndarray:
    """Zeros that were not punched yet are taken from the device."""
    return np.where(kept >= Kept.LOCAL, Residency.PRESENT, kept).astype(np.uint8)


async def lies(self: VolatileDevice) -> None:
    """A flush that leaves everything in the cache."""


@pytest.mark.parametrize(
    ("target", "sabotage"),
    [
        ("silo.volumestate.DurableState.checkpoint", forgetful),
        ("silo.volumestate.states_after_power_loss", believes_maps),
        ("silo.devices.volatile.VolatileDevice.flush", lies),
    ],
)
def test_the_test_would_notice(
    target: str, sabotage: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the three steps of a flush is needed."""
    monkeypatch.setattr(target, sabotage)
    with pytest.raises(AssertionError, match="which is none of"):
        for seed in range(100):
            lives(seed, tmp_path)
