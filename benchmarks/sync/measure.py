"""The measurements: a whole disk to the store, and steady cuts. Both on a store in a directory, with its fsyncs.

Ours is everything that `HostedGroup.sync_now` does: cut, read, hash, compress (which finds the content
incompressible), pack, PUT, and the commit in the register. The bare client PUTs the same bytes as objects of the
size of a segment, as many at once as the syncer's window allows, and does nothing else. The store is a `FileStore`
in this process for both, so the CPU time is that of the process.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

import silo
from benchmarks.common.turns import Sample
from silo.abc import Buffer
from silo.clock import SystemClock
from silo.sync.file_store import FileStore

__all__ = ["CHUNK", "CountingStore", "cut_once", "put_bare", "sync_whole"]

T = TypeVar("T")

CHUNK = 64 << 10
MIB = 1 << 20
SETTINGS = silo.SyncSettings(rpo_s=3600.0)
"""No cut comes by itself."""


class CountingStore(FileStore):
    """A store in a directory that counts what is PUT, on its own rather than by what the syncer says."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, SystemClock())
        self.puts = 0
        self.put_bytes = 0

    async def put(self, key: str, data: Sequence[Buffer]) -> str:
        """As `FileStore.put`."""
        self._count(data)
        return await super().put(key, data)

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        """As `FileStore.put_if`."""
        self._count(data)
        return await super().put_if(key, data, match=match)

    def _count(self, data: Sequence[Buffer]) -> None:
        self.puts += 1
        self.put_bytes += sum(len(memoryview(part).cast("B")) for part in data)


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


def sync_whole(size: int, seed: int, parent: Path | None) -> Sample:
    """Store a disk of incompressible bytes of which the store has nothing."""
    return asyncio.run(_in_directory(_sync_whole, size, seed, parent))


def put_bare(size: int, seed: int, parent: Path | None) -> Sample:
    """PUT the same bytes, with nothing around it."""
    return asyncio.run(_in_directory(_put_bare, size, seed, parent))


def cut_once(size: int, dirty_chunks: int, cuts: int, seed: int, parent: Path | None) -> list[Sample]:
    """``cuts`` steady cuts of a stored disk, each after so many distinct chunks, far apart, were written again."""

    async def measure(directory: Path, size: int, seed: int) -> list[Sample]:
        return await _steady(directory, size, dirty_chunks, cuts, seed)

    return asyncio.run(_in_directory(measure, size, seed, parent))


async def _in_directory(
    measure: Callable[[Path, int, int], Awaitable[T]], size: int, seed: int, parent: Path | None
) -> T:
    directory = Path(tempfile.mkdtemp(prefix="silo-bench-", dir=parent))
    try:
        return await measure(directory, size, seed)
    finally:
        shutil.rmtree(directory)


async def _sync_whole(directory: Path, size: int, seed: int) -> Sample:
    store = CountingStore(directory / "store")
    async with silo.Host(directory / "state") as host:
        group = await host.open_group("bench", {"disk": silo.MemoryDevice(size)}, store=store, sync=SETTINGS)
        generator = np.random.default_rng(seed)
        for offset in range(0, size, MIB):
            await group.volumes["disk"].write(offset, generator.bytes(MIB))
        before = store.put_bytes
        os.sync()  # what the other contender left behind is not ours to wait for
        with Timed() as timed:
            await group.sync_now()
        put_bytes = store.put_bytes - before
    await store.aclose()
    return {**timed.sample(size), "put_ratio": put_bytes / size}


async def _put_bare(directory: Path, size: int, seed: int) -> Sample:
    store = CountingStore(directory / "store")
    segment = min(SETTINGS.segment_size, size)
    lanes = asyncio.Semaphore(max(1, SETTINGS.window // segment))
    generator = np.random.default_rng(seed)
    objects = [generator.bytes(segment) for _ in range(math.ceil(size / segment))]

    async def put(number: int) -> None:
        async with lanes:
            await store.put(f"bench/{number}", [objects[number]])

    os.sync()
    with Timed() as timed:
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(objects)):
                tasks.create_task(put(number))
    await store.aclose()
    return timed.sample(len(objects) * segment)


async def _steady(directory: Path, size: int, dirty_chunks: int, cuts: int, seed: int) -> list[Sample]:
    store = CountingStore(directory / "store")
    generator = np.random.default_rng(seed)
    samples: list[Sample] = []
    async with silo.Host(directory / "state") as host:
        group = await host.open_group("bench", {"disk": silo.MemoryDevice(size)}, store=store, sync=SETTINGS)
        volume = group.volumes["disk"]
        for offset in range(0, size, MIB):
            await volume.write(offset, generator.bytes(MIB))
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
