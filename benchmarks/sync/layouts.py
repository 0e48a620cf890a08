"""The same writes, the same intervals, several layouts: what each uploads, how often it asks, what CPU time it takes.

*silo N* is the real thing with chunks of N bytes. *object per chunk* is what a simple store of blocks does at the same
interval: every chunk that changed since the last cut is compressed in the same way and PUT under a key of its own.
(Nothing of that is a state that the disk ever had, until all have arrived.) Everything goes to a store in a dictionary,
so CPU time is our own; a request to a real store costs more, which is against whoever makes many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np

import silo
from benchmarks.sync.measure import MIB, SETTINGS, Timed, noise
from benchmarks.sync.stores import PlainStore, scratch
from benchmarks.sync.traces import RANDOM, Cut, image_size, random_cut, untar_cuts
from silo.clock import SystemClock
from silo.devices.memory import MemoryDevice
from silo.sync.codec import ChunkEncoder
from silo.sync.reader import StoreReader
from silo.sync.restore import open_newest, restore_volume

__all__ = ["CHUNK_SIZES", "Layout", "Restored", "run_layouts"]

CHUNK_SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
_LANES = 16


@attrs.frozen
class Layout:
    """What one layout did with one kind of writes."""

    workload: str
    layout: str
    chunk_size: int
    cuts: int
    written: int
    put_bytes: int
    puts: int
    cpu_s: float

    @property
    def upload_ratio(self) -> float:
        """Bytes uploaded ÷ bytes written."""
        return self.put_bytes / self.written


@attrs.frozen
class Restored:
    """A restore of the disk as it was after all random writes."""

    chunk_size: int
    first_cpu_s_per_gib: float
    """Of the first sync, before."""
    wall_s: float
    cpu_s_per_gib: float
    gets: int
    read_ratio: float
    """Bytes read from the store ÷ bytes of the disk."""


def run_layouts(
    size: int, writes: int, cuts: int, parent: Path | None
) -> tuple[list[Layout], list[Restored]]:
    """Everything: random writes over a stored disk of ``size`` bytes, and the archive over an empty one."""
    found: list[Layout] = []
    restored: list[Restored] = []
    content = noise(size, 1)
    for chunk_size in CHUNK_SIZES:
        with scratch(parent) as place:
            layouts, restore = asyncio.run(_run_silo(place, chunk_size, content, writes, cuts))
            found += layouts
            restored.append(restore)
    for kind in RANDOM:
        found.append(
            asyncio.run(_object_per_chunk(kind, size, list(_random(kind, size, writes, cuts)), content))
        )
    with scratch(parent) as place:
        unpacked = list(untar_cuts(place))
        if unpacked:
            for chunk_size in CHUNK_SIZES:
                with scratch(parent) as other:
                    found.append(asyncio.run(_run_untar(other, chunk_size, unpacked)))
            found.append(asyncio.run(_object_per_chunk("untar", image_size(), unpacked, ())))
    return found, restored


def _random(kind: str, size: int, writes: int, cuts: int) -> Iterator[Cut]:
    generator = np.random.default_rng(7)
    for number in range(cuts):
        yield random_cut(kind, writes, size, generator, number)


async def _run_silo(
    place: Path, chunk_size: int, content: Sequence[bytes], writes: int, cuts: int
) -> tuple[list[Layout], Restored]:
    store = PlainStore()
    size = len(content) * MIB
    async with silo.Host(place) as host:
        disk = silo.VolumeSpec(silo.MemoryDevice(size), chunk_size=chunk_size)
        group = await host.open_group("bench", {"disk": disk}, store=store, sync=SETTINGS)
        for number, part in enumerate(content):
            await group.volumes["disk"].write(number * MIB, part)
        with Timed() as first:
            await group.sync_now()
        found = [
            await _sync_cuts(group, store, kind, chunk_size, _random(kind, size, writes, cuts))
            for kind in RANDOM
        ]
    return found, await _restore(store, size, chunk_size, first.cpu_s / size * 2**30)


async def _run_untar(place: Path, chunk_size: int, cuts: Sequence[Cut]) -> Layout:
    store = PlainStore()
    async with silo.Host(place) as host:
        disk = silo.VolumeSpec(silo.MemoryDevice(image_size()), chunk_size=chunk_size)
        group = await host.open_group("bench", {"disk": disk}, store=store, sync=SETTINGS)
        await group.sync_now()
        return await _sync_cuts(group, store, "untar", chunk_size, cuts)


async def _sync_cuts(
    group: silo.HostedGroup, store: PlainStore, workload: str, chunk_size: int, cuts: Iterable[Cut]
) -> Layout:
    puts, put_bytes = store.puts, store.put_bytes
    written = count = 0
    cpu_s = 0.0
    for cut in cuts:
        for offset, content in cut:
            await group.volumes["disk"].write(offset, content)
            written += len(content)
        count += 1
        with Timed() as timed:
            await group.sync_now()
        cpu_s += timed.cpu_s
    name = f"silo, {chunk_size >> 10} KiB"
    return Layout(
        workload, name, chunk_size, count, written, store.put_bytes - put_bytes, store.puts - puts, cpu_s
    )


async def _object_per_chunk(
    workload: str, size: int, cuts: Sequence[Cut], content: Sequence[bytes]
) -> Layout:
    chunk_size = 64 << 10
    store, encoder, device = PlainStore(), ChunkEncoder(), MemoryDevice(size)
    for number, part in enumerate(content):
        device.write_nowait(number * MIB, part)
    lanes = asyncio.Semaphore(_LANES)

    async def put(chunk: int) -> None:
        async with lanes:
            encoded = encoder.encode(bytes(device.read_nowait(chunk * chunk_size, chunk_size)))
            await store.put(f"chunks/{chunk}", [encoded.payload if encoded else b""])

    written = 0
    cpu_s = 0.0
    for cut in cuts:
        dirty: set[int] = set()
        for offset, data in cut:
            device.write_nowait(offset, data)
            dirty.update(range(offset // chunk_size, (offset + len(data) - 1) // chunk_size + 1))
            written += len(data)
        with Timed() as timed:
            async with asyncio.TaskGroup() as tasks:
                for chunk in sorted(dirty):
                    tasks.create_task(put(chunk))
        cpu_s += timed.cpu_s
    name = "object per chunk, 64 KiB"
    return Layout(workload, name, chunk_size, len(cuts), written, store.put_bytes, store.puts, cpu_s)


async def _restore(store: PlainStore, size: int, chunk_size: int, first_cpu_s_per_gib: float) -> Restored:
    reader = StoreReader(store, SystemClock())
    gets, get_bytes = store.gets, store.get_bytes
    device = MemoryDevice(size)
    with Timed() as timed:
        manifest = await open_newest(reader, "bench")
        await restore_volume(manifest, reader, "disk", device)
    manifest.close()
    await device.aclose()
    return Restored(
        chunk_size,
        first_cpu_s_per_gib,
        timed.wall_s,
        timed.cpu_s / size * 2**30,
        store.gets - gets,
        (store.get_bytes - get_bytes) / size,
    )
