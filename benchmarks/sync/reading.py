"""Reading from the store: what a guest waits for while its disk is still there, and how soon there is a first byte."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import numpy as np

import silo
from benchmarks.common.turns import Sample
from benchmarks.sync.measure import CHUNK, MIB, SETTINGS, noise
from benchmarks.sync.stores import Opener, PlainStore, empty, scratch
from silo.clock import SystemClock
from silo.sync.reader import StoreReader
from silo.sync.restore import open_newest
from silo.sync.store_source import StoreSource

__all__ = ["first_byte_trips", "lazy_reads"]

_LATENCY_S = 0.05
"""Large against everything that happens between two requests."""


def lazy_reads(
    open_store: Opener, size: int, reads: int, rounds: int, parent: Path | None
) -> dict[str, list[Sample]]:
    """Reads of chunks that are only in the store, and bare ranged GETs of as many bytes, one after the other in turn.

    ``silo`` is a read of 4 KiB through a volume: map, GET of the chunk, verification, filling of the device.
    """
    with scratch(parent) as place:
        return asyncio.run(_lazy_reads(open_store, place, size, reads, rounds))


async def _lazy_reads(
    open_store: Opener, scratched: Path, size: int, reads: int, rounds: int
) -> dict[str, list[Sample]]:
    store = open_store(scratched)
    async with silo.Host(scratched / "writer") as host:
        group = await host.open_group("bench", {"disk": silo.MemoryDevice(size)}, store=store, sync=SETTINGS)
        for number, part in enumerate(noise(size, 3)):
            await group.volumes["disk"].write(number * MIB, part)
        await group.sync_now()
    reader = StoreReader(store, SystemClock())
    manifest = await open_newest(reader, "bench")
    source = StoreSource(manifest, reader)
    chosen = np.random.default_rng(3).permutation(size // CHUNK).tolist()
    samples: dict[str, list[Sample]] = {"silo": [], "bare": []}
    for _ in range(rounds):
        ours: list[float] = []
        bare: list[float] = []
        for _ in range(reads):
            chunk, other = chosen.pop(), chosen.pop()
            place = await manifest.locate("disk", other, demand=True)
            ours.append(await _timed(partial(source.fetch, "disk", chunk, demand=True)))
            bare.append(await _timed(partial(store.get, place.key, start=place.offset, length=place.length)))
        samples["silo"].append({"p50_ms": statistics.median(ours)})
        samples["bare"].append({"p50_ms": statistics.median(bare)})
    await source.aclose()
    manifest.close()
    await empty(store)
    await store.aclose()
    return samples


async def _timed(call: Callable[[], Awaitable[object]]) -> float:
    started = time.perf_counter()
    await call()
    return (time.perf_counter() - started) * 1e3


def first_byte_trips(parent: Path | None) -> Sample:
    """Round trips until the first byte of a lazy restore is there, and until a whole new host serves it."""
    with scratch(parent) as place:
        return asyncio.run(_first_byte_trips(place))


async def _first_byte_trips(place: Path) -> Sample:
    size = 64 * MIB
    store = PlainStore()
    async with silo.Host(place / "writer") as host:
        group = await host.open_group("bench", {"disk": silo.MemoryDevice(size)}, store=store, sync=SETTINGS)
        for number, part in enumerate(noise(size, 4)):
            await group.volumes["disk"].write(number * MIB, part)
        await group.sync_now()
    store.latency_s = _LATENCY_S
    reader = StoreReader(store, SystemClock())
    started = time.perf_counter()
    manifest = await open_newest(reader, "bench", complete=False)
    source = StoreSource(manifest, reader)
    await source.fetch("disk", 77, demand=True)
    restored_s = time.perf_counter() - started
    await source.aclose()
    manifest.close()
    started = time.perf_counter()
    async with silo.Host(place / "reader") as host:
        group = await host.open_group("bench", {"disk": silo.MemoryDevice(size)}, store=store, sync=SETTINGS)
        await group.volumes["disk"].read(5 * MIB, 4096)
        opened_s = time.perf_counter() - started
        store.latency_s = 0.0
    return {"restore_trips": restored_s / _LATENCY_S, "open_trips": opened_s / _LATENCY_S}
