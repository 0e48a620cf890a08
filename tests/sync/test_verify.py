"""Verifying a generation: sound ones are, and whatever is damaged is found."""

from __future__ import annotations

import attrs
import pytest

from silo.errors import InvalidRequestError
from silo.sync.memory_store import MemoryStore
from silo.sync.reader import StoreReader
from silo.sync.restore import open_newest
from silo.sync.verify import VerifyReport, verify_generation
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, FETCH, SETTINGS, make_group, syncing


async def verified(store: MemoryStore, clock: SimulatedClock, sample: float = 1.0) -> VerifyReport:
    """The newest generation, as a reader finds it."""
    reader = StoreReader(store.client("reader"), clock, FETCH)
    manifest = await open_newest(reader, "vm1")
    seen: list[tuple[int, int]] = []
    try:
        report = await verify_generation(
            manifest, reader, clock, sample=sample, progress=lambda done, total: seen.append((done, total))
        )
    finally:
        manifest.close()
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    return report


async def fill(store: MemoryStore, clock: SimulatedClock) -> None:
    """Two volumes, pages of the map, and segments after them."""
    group = make_group(clock, {"disk": 2000 * CHUNK, "data": 10 * CHUNK + 512})
    settings = attrs.evolve(SETTINGS, checkpoint_segments=1, segment_size=40 * CHUNK)
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        for chunk in range(100):
            await it.disk.write((chunk * 19) * CHUNK, clock.token(CHUNK))
        await it.syncer.sync_now()
        it.syncer.amendments.wants_checkpoint = True
        await it.syncer.sync_now()
        await group.volumes["data"].write(10 * CHUNK, b"x" * 512)
        await it.syncer.sync_now()


@simulated
async def test_a_sound_generation(clock: SimulatedClock) -> None:
    """All chunks with content are compared; of a sample some."""
    store = MemoryStore(clock)
    await fill(store, clock)
    report = await verified(store, clock)
    assert (report.is_sound, report.chunks, report.damages) == (True, 101, [])
    assert report.bytes_store > 100 * CHUNK
    part = await verified(store, clock, sample=0.3)
    assert part.is_sound
    assert 5 < part.chunks < 60
    with pytest.raises(InvalidRequestError):
        await verified(store, clock, sample=0)


@simulated
async def test_every_kind_of_damage_is_found(clock: SimulatedClock) -> None:
    """A flipped bit in a chunk, a missing segment, a damaged page; the rest is compared all the same."""
    store = MemoryStore(clock)
    await fill(store, clock)
    sound = dict(store.objects)
    segments = [key for key in sound if "/segments/" in key and len(sound[key].data) > 20 * CHUNK]
    store.corrupt(segments[0], offset=5 * CHUNK)
    report = await verified(store, clock)
    assert (report.damaged_chunks, report.chunks, len(report.damages)) == (1, 101, 1)
    store.objects = dict(sound)
    store.remove(segments[0])
    report = await verified(store, clock)
    assert 10 < report.damaged_chunks < 101
    assert report.chunks + report.damaged_chunks == 101
    assert "missing" in report.damages[0].why
    pages = [key for key in sound if sound[key].data.startswith(b"SILOMAP")]
    store.objects = dict(sound)
    store.corrupt(pages[-1], offset=200)
    report = await verified(store, clock)
    assert report.damaged_chunks >= 976
    assert "page" in report.damages[0].why
