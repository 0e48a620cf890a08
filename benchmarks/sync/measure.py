"""The measurements: a whole disk to the store, and steady cuts.

Ours is everything that `HostedGroup.sync_now` does: cut, capture, hash, find out that the content does not compress,
pack, PUT, and the commit in the register. The bare client PUTs the same bytes as objects of the size of a segment, as
many at once as the syncer's window allows, and does nothing else. The CPU time is that of this process: a store in a
directory is part of it, an S3 server is not.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

import silo
from benchmarks.common.turns import Sample
from benchmarks.sync.stores import Opener, empty, scratch

__all__ = ["CHUNK", "MIB", "SETTINGS", "Timed", "cut_once", "noise", "put_bare", "sync_whole"]

CHUNK = 64 << 10
MIB = 1 << 20
SETTINGS = silo.SyncSettings(rpo_s=3600.0)
"""No cut comes by itself."""


class Timed:
    """Wall and CPU time of a block."""

    def __enter__(self) -> Self:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s = time.perf_counter() - self._wall
        self.cpu_s = time.process_time() - self._cpu

    def sample(self, size: int) -> Sample:
        """What `size` bytes took."""
        return {"mb_s": size / self.wall_s / 1e6, "cpu_s_per_gib": self.cpu_s / size * 2**30}


def noise(size: int, seed: int) -> list[bytes]:
    """Mebibytes that do not compress."""
    generator = np.random.default_rng(seed)
    return [generator.bytes(MIB) for _ in range(size // MIB)]


def sync_whole(open_store: Opener, content: Sequence[bytes], parent: Path | None) -> Sample:
    """Store a disk of which the store has nothing."""
    with scratch(parent) as place:
        return asyncio.run(_sync_whole(open_store, content, place))


def put_bare(open_store: Opener, content: Sequence[bytes], parent: Path | None) -> Sample:
    """PUT the same bytes, with nothing around it."""
    with scratch(parent) as place:
        return asyncio.run(_put_bare(open_store, content, place))


def cut_once(
    open_store: Opener, size: int, dirty_chunks: int, cuts: int, seed: int, parent: Path | None
) -> list[Sample]:
    """``cuts`` steady cuts of a stored disk, each after so many distinct chunks, far apart, were written again."""
    with scratch(parent) as place:
        return asyncio.run(_steady(open_store, place, size, dirty_chunks, cuts, seed))


async def _sync_whole(open_store: Opener, content: Sequence[bytes], place: Path) -> Sample:
    store = open_store(place)
    size = len(content) * MIB
    async with silo.Host(place / "state") as host:
        group = await host.open_group("bench", {"disk": silo.MemoryDevice(size)}, store=store, sync=SETTINGS)
        for number, part in enumerate(content):
            await group.volumes["disk"].write(number * MIB, part)
        before = store.put_bytes
        os.sync()  # what the other contender left behind is not ours to wait for
        with Timed() as timed:
            await group.sync_now()
        put_bytes = store.put_bytes - before
    await empty(store)
    await store.aclose()
    return {**timed.sample(size), "put_ratio": put_bytes / size}


async def _put_bare(open_store: Opener, content: Sequence[bytes], place: Path) -> Sample:
    store = open_store(place)
    step = SETTINGS.segment_size // MIB
    objects = [b"".join(content[first : first + step]) for first in range(0, len(content), step)]
    lanes = asyncio.Semaphore(SETTINGS.window // SETTINGS.segment_size)

    async def put(number: int) -> None:
        async with lanes:
            await store.put(f"bench/{number}", [objects[number]])

    os.sync()
    with Timed() as timed:
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(objects)):
                tasks.create_task(put(number))
    await empty(store)
    await store.aclose()
    return timed.sample(len(content) * MIB)


async def _steady(
    open_store: Opener, place: Path, size: int, dirty_chunks: int, cuts: int, seed: int
) -> list[Sample]:
    store = open_store(place)
    generator = np.random.default_rng(seed)
    samples: list[Sample] = []
    async with silo.Host(place / "state") as host:
        group = await host.open_group("bench", {"disk": silo.MemoryDevice(size)}, store=store, sync=SETTINGS)
        volume = group.volumes["disk"]
        for number, part in enumerate(noise(size, seed)):
            await volume.write(number * MIB, part)
        await group.sync_now()
        for _ in range(cuts):
            chunks = generator.choice(size // CHUNK, dirty_chunks, replace=False)
            for chunk in chunks.tolist():
                await volume.write(chunk * CHUNK, generator.bytes(CHUNK))
            puts, put_bytes = store.puts, store.put_bytes
            with Timed() as timed:
                await group.sync_now()
            samples.append(
                {
                    "puts": store.puts - puts,
                    "put_ratio": (store.put_bytes - put_bytes) / (dirty_chunks * CHUNK),
                    "cut_ms": timed.wall_s * 1e3,
                }
            )
    await store.aclose()
    return samples
