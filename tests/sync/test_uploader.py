"""Uploads: bounded memory, coldest first, the same cut makes the same segments."""

from __future__ import annotations

import attrs

from silo.sync.codec import Kind
from silo.sync.memory_store import MemoryClient, MemoryStore
from silo.sync.segment import parse_index
from silo.sync.uploader import merged
from silo.testing.loop import SimulatedClock, run_simulated
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, SETTINGS, Syncing, make_group, restored, syncing


class CountingClient(MemoryClient):
    """Knows how many bytes of segments are on their way."""

    now = most = 0

    async def put_if(self, key, data, *, match):
        size = sum(map(len, data)) if "segments" in key else 0
        self.now += size
        self.most = max(self.most, self.now)
        try:
            return await super().put_if(key, data, match=match)
        finally:
            self.now -= size


def entries(store: MemoryStore, it: Syncing) -> list[list[tuple[int, int]]]:
    """``(kind, chunk)`` of every entry of every segment that the head lists."""
    found = []
    for segment in it.head.segments:
        data = store.snapshot()[segment.key]
        index = parse_index(
            data[segment.index_offset :][: segment.index_length],
            index_offset=segment.index_offset,
            digest=bytes.fromhex(segment.index_digest),
        )
        found.append([(int(entry["kind"]), int(entry["chunk"])) for entry in index.entries])
    return found


@simulated
async def test_uploads_overlap_within_the_window(clock: SimulatedClock) -> None:
    """Several segments are on their way at once, and never more bytes than the window."""
    store = MemoryStore(clock, latency_s=1.0)
    client = CountingClient(store, "counting")
    settings = attrs.evolve(SETTINGS, segment_size=64 * 1024, window=256 * 1024, batch_size=8 * CHUNK)
    group = make_group(clock, {"disk": 512 * CHUNK})
    async with syncing(client, clock, group=group, settings=settings) as it:
        for chunk in range(512):
            await it.write(chunk, clock.token(CHUNK))
        before = clock.monotonic()
        await it.syncer.sync_now()
        assert 128 * 1024 < client.most <= 256 * 1024
        assert clock.monotonic() - before < 34 * 1.0  # one after the other would take that long
        assert all(len(data) <= 64 * 1024 for key, data in store.snapshot().items() if "segments" in key)
        assert await restored(store.clone().client(), clock) == it.image()


@simulated
async def test_cold_chunks_come_first(clock: SimulatedClock) -> None:
    """What is written again and again is packed last; otherwise the disk's own order stays."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        for hot in (3, 9):
            for _ in range(20):
                await it.write(hot, clock.token(CHUNK))
        for chunk in range(12):
            await it.write(chunk, clock.token(CHUNK))
        await it.syncer.sync_now()
        (order,) = entries(store, it)
        assert [chunk for _, chunk in order] == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 3, 9]


@simulated
async def test_zeros_become_runs(clock: SimulatedClock) -> None:
    """Zeroed and written as zeros, side by side: one entry."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        for chunk in range(20):
            await it.write(chunk, b"x")
        await it.syncer.sync_now()
        await it.disk.zero(0, 4 * CHUNK)
        await it.write(4, b"\0")
        await it.write(5, b"\0")
        await it.disk.zero(6 * CHUNK, 2 * CHUNK)
        await it.disk.zero(18 * CHUNK, 10 * CHUNK)
        await it.syncer.sync_now()
        assert entries(store, it)[1] == [(Kind.ZERO, 0), (Kind.ZERO, 18)]


def test_the_same_cut_makes_the_same_segments() -> None:
    """Whichever thread is faster."""

    async def scenario(clock: SimulatedClock) -> list[list[tuple[int, int]]]:
        store = MemoryStore(clock)
        settings = attrs.evolve(SETTINGS, segment_size=64 * 1024, batch_size=CHUNK, threads=4)
        async with syncing(store.client(), clock, settings=settings) as it:
            for chunk in range(64):
                await it.write(
                    chunk, bytes(range(chunk, chunk + 128)) * 32 if chunk % 3 else clock.token(CHUNK)
                )
            await it.syncer.sync_now()
            return entries(store, it)

    assert len({str(run_simulated(scenario, seed=seed)) for seed in range(5)}) == 1


def test_runs_that_touch_are_joined() -> None:
    assert merged([(5, 7), (0, 2), (2, 5), (9, 10)]) == [(0, 7), (9, 10)]
    assert merged([]) == []
