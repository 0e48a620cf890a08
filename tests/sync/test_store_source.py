"""The store as a source of chunks: verified, patient on demand, few requests in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest

from silo.chunkmap import ChunkMap, Residency
from silo.devices.memory import MemoryDevice
from silo.errors import ClosedError, CorruptionError, UnavailableError
from silo.geometry import Geometry
from silo.group import Group
from silo.sync.codec import Kind, digest_of
from silo.sync.manifest import Manifest
from silo.sync.memory_store import MemoryStore
from silo.sync.reader import StoreReader
from silo.sync.restore import mark_absent, open_newest
from silo.sync.segment import SegmentBuilder, parse_index
from silo.sync.settings import FetchSettings
from silo.sync.store_faults import Fault, FaultKind, Verb
from silo.sync.store_source import StoreSource
from silo.testing.loop import SimulatedClock, explore
from tests.support.seeds import seeds
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, FETCH, SETTINGS, make_group, syncing

CHUNKS = 3000


async def filled_store(clock: SimulatedClock, *, checkpoint_segments: int = 64) -> tuple[MemoryStore, bytes]:
    """A store with one volume: noise in every second of the first 200 chunks, then text in six from 2000 on."""
    store = MemoryStore(clock)
    group = make_group(clock, {"disk": CHUNKS * CHUNK})
    settings = attrs.evolve(SETTINGS, checkpoint_segments=checkpoint_segments)
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        for chunk in range(0, 200, 2):
            await it.write(chunk, clock.token(CHUNK))
        await it.syncer.sync_now()
        for chunk in range(2000, 2006):
            await it.write(chunk, b"text")
            await it.syncer.sync_now()
    store.log.clear()
    return store, it.image()["disk"]


@asynccontextmanager
async def source_of(
    store: MemoryStore, clock: SimulatedClock, settings: FetchSettings = FETCH, *, complete: bool = True
) -> AsyncIterator[StoreSource]:
    reader = StoreReader(store.client(), clock, settings)
    manifest = await open_newest(reader, "vm1", complete=complete)
    source = StoreSource(manifest, reader)
    try:
        yield source
    finally:
        await source.aclose()
        source.manifest.close()


def content_of(image: bytes, chunk: int) -> bytes | None:
    content = image[chunk * CHUNK : (chunk + 1) * CHUNK]
    return content if any(content) else None


def gets(store: MemoryStore) -> list[str]:
    return [operation.key.split("/")[1] for operation in store.log if operation.verb is Verb.GET]


@simulated
async def test_every_chunk_is_as_it_was_stored(clock: SimulatedClock) -> None:
    """On demand and in the background, with and without a root."""
    for checkpoint_segments in (64, 1):
        store, image = await filled_store(clock, checkpoint_segments=checkpoint_segments)
        async with source_of(store, clock) as source:
            for chunk in (0, 1, 2, 198, 199, 1500, 2000, 2001, CHUNKS - 1):
                for demand in (True, False):
                    found = await source.fetch("disk", chunk, demand=demand)
                    assert (None if found is None else bytes(found)) == content_of(image, chunk)


@simulated
async def test_the_first_byte_takes_three_round_trips(clock: SimulatedClock) -> None:
    """Head; then the indexes and the page of the map; then the chunk."""
    for checkpoint_segments in (64, 1):
        store, image = await filled_store(clock, checkpoint_segments=checkpoint_segments)
        store.latency_s = 1.0
        started = clock.monotonic()
        async with source_of(store, clock, complete=False) as source:
            chunks = ChunkMap.filled(CHUNKS, Residency.PRESENT)
            mark_absent(source.manifest, "disk", chunks, device_is_zero=True)
            assert chunks.count_residency()[Residency.ABSENT_STORE] == CHUNKS
            found = await source.fetch("disk", 4, demand=True)
            assert found is not None
            assert bytes(found) == content_of(image, 4)
            assert (source.manifest.head.root is not None) == (checkpoint_segments == 1)
            assert clock.monotonic() - started == pytest.approx(3.0)
            started = clock.monotonic()
            await source.fetch("disk", 6, demand=True)
            assert clock.monotonic() - started == pytest.approx(1.0)


@simulated
async def test_background_neighbours_share_requests(clock: SimulatedClock) -> None:
    """A hundred chunks of one segment come with a handful of requests."""
    store, image = await filled_store(clock)
    async with source_of(store, clock, attrs.evolve(FETCH, background_lanes=2)) as source:
        store.log.clear()
        async with asyncio.TaskGroup() as tasks:
            fetches = {
                chunk: tasks.create_task(source.fetch("disk", chunk, demand=False))
                for chunk in range(0, 200, 2)
            }
        for chunk, task in fetches.items():
            found = task.result()
            assert found is not None
            assert bytes(found) == content_of(image, chunk)
        assert len(gets(store)) <= 4
        assert source.fetched_chunks == 100


@simulated
async def test_demand_overtakes_the_background(clock: SimulatedClock) -> None:
    """With all background lanes stuck a guest's read goes out at once."""
    store, image = await filled_store(clock)
    settings = attrs.evolve(FETCH, background_lanes=1, run_size=CHUNK)
    async with source_of(store, clock, settings) as source:
        store.inject(FaultKind.HOLD, Verb.GET, times=1)
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(source.fetch("disk", chunk, demand=False)) for chunk in (0, 2, 4)]
            await store.wait_held()
            found = await source.fetch("disk", 2, demand=True)
            assert found is not None
            assert bytes(found) == content_of(image, 2)
            assert not any(task.done() for task in waiting)
            store.release_held()


@simulated
async def test_a_damaged_answer_is_read_once_more(clock: SimulatedClock) -> None:
    """A bit that flipped on its way heals, one that flipped in the store is an error and never content."""
    store, image = await filled_store(clock)
    for demand in (True, False):
        async with source_of(store, clock) as source:
            store.inject(FaultKind.CORRUPT, Verb.GET, key="*/segments/*")
            found = await source.fetch("disk", 4, demand=demand)
            assert found is not None
            assert bytes(found) == content_of(image, 4)
    async with source_of(store, clock) as source:
        key = next(iter(source.manifest.head.segments)).key
        data = bytearray(store.snapshot()[key])
        place = source.manifest.volume("disk").locate(4)
        assert place is not None
        data[place.offset + 7] ^= 1
        store.place(key, bytes(data))
        for demand in (True, False):
            with pytest.raises(CorruptionError, match="chunk 4 of disk"):
                await source.fetch("disk", 4, demand=demand)
            found = await source.fetch("disk", 6, demand=demand)
            assert found is not None
            assert bytes(found) == content_of(image, 6)


@simulated
async def test_a_missing_object_is_never_zeros(clock: SimulatedClock) -> None:
    """Looked up twice, then an error."""
    store, _ = await filled_store(clock)
    async with source_of(store, clock) as source:
        key = next(iter(source.manifest.head.segments)).key
        removed = store.snapshot()[key]
        store.remove(key)
        for demand in (True, False):
            store.log.clear()
            with pytest.raises(CorruptionError, match="missing from the store"):
                await source.fetch("disk", 4, demand=demand)
            assert len(gets(store)) == 2
        store.place(key, removed[:100])
        for demand in (True, False):
            with pytest.raises(CorruptionError, match="shorter"):
                await source.fetch("disk", 198, demand=demand)


@simulated
async def test_a_flipped_bit_in_an_index_prevents_opening(clock: SimulatedClock) -> None:
    store, _ = await filled_store(clock)
    reader = StoreReader(store.client(), clock, FETCH)
    manifest = await open_newest(reader, "vm1")
    manifest.close()
    segment = manifest.head.segments[-1]
    data = bytearray(store.snapshot()[segment.key])
    data[segment.index_offset + segment.index_length - 1] ^= 1
    store.place(segment.key, bytes(data))
    with pytest.raises(CorruptionError, match="index"):
        await Manifest.open(manifest.head, reader)


@simulated
async def test_a_flipped_bit_in_a_page_fails_the_reads_that_need_it(clock: SimulatedClock) -> None:
    store, image = await filled_store(clock, checkpoint_segments=1)
    async with source_of(store, clock) as source:
        part = source.manifest.volume("disk").parts[0]
        data = bytearray(store.snapshot()[part.key])
        data[part.offset + part.length // 2] ^= 1
        store.place(part.key, bytes(data))
        for demand in (True, False):
            with pytest.raises(CorruptionError, match="page 0"):
                await source.fetch("disk", 4, demand=demand)
        found = await source.fetch("disk", 2001, demand=True)
        assert found is not None
        assert bytes(found) == content_of(image, 2001)


@simulated
async def test_a_guest_is_waited_for_and_the_background_is_not(clock: SimulatedClock) -> None:
    """On demand the store has some time to come back; in the background the caller has."""
    store, image = await filled_store(clock)
    async with source_of(store, clock) as source:
        store.offline = True
        with pytest.raises(UnavailableError):
            await source.fetch("disk", 4, demand=False)
        before = clock.monotonic()
        with pytest.raises(UnavailableError):
            await source.fetch("disk", 4, demand=True)
        assert FETCH.patience_s - 3 < clock.monotonic() - before <= FETCH.patience_s
        async with asyncio.TaskGroup() as tasks:
            fetch = tasks.create_task(source.fetch("disk", 4, demand=True))
            await asyncio.sleep(FETCH.patience_s / 2)
            store.offline = False
        found = fetch.result()
        assert found is not None
        assert bytes(found) == content_of(image, 4)


@simulated
async def test_the_manifest_may_be_replaced_while_it_is_used(clock: SimulatedClock) -> None:
    """Whoever was reading through the old one, which is closed, reads through the new one."""
    store, image = await filled_store(clock, checkpoint_segments=1)
    async with source_of(store, clock, complete=False) as source:
        old = source.manifest
        store.inject(FaultKind.HOLD, Verb.GET, times=3)
        async with asyncio.TaskGroup() as tasks:
            fetches = [tasks.create_task(source.fetch("disk", 4, demand=demand)) for demand in (True, False)]
            await store.wait_held(2)
            store.rules.clear()
            source.manifest = await Manifest.open(old.head, StoreReader(store.client(), clock, FETCH))
            old.close()
            store.release_held()
        for fetch in fetches:
            found = fetch.result()
            assert found is not None
            assert bytes(found) == content_of(image, 4)
        with pytest.raises(ClosedError):
            await old.locate("disk", 4, demand=True)


@simulated
async def test_an_inherited_chunk_needs_its_base(clock: SimulatedClock) -> None:
    """It is in another image, and says in which."""
    store, _ = await filled_store(clock)
    base = digest_of(b"base")
    async with source_of(store, clock) as source:
        builder = SegmentBuilder("vm1", ["disk"])
        builder.add_run("disk", 7, 8, base=base)
        sealed = builder.seal()
        index = parse_index(sealed.index, index_offset=sealed.index_offset, digest=sealed.index_digest)
        source.manifest.maps.apply(index, "unused")
        place = source.manifest.volume("disk").locate(7)
        assert place is not None
        assert place.kind is Kind.INHERIT
        with pytest.raises(CorruptionError, match=base.hex()):
            await source.fetch("disk", 7, demand=True)


@simulated
async def test_a_volume_is_restored_lazily(clock: SimulatedClock) -> None:
    """Served at once; reads hydrate, whole-chunk writes fetch nothing."""
    store, image = await filled_store(clock, checkpoint_segments=1)
    async with source_of(store, clock) as source:
        group = Group("vm1", clock)
        chunks = ChunkMap.filled(CHUNKS, Residency.PRESENT)
        mark_absent(source.manifest, "disk", chunks, device_is_zero=True)
        counts = chunks.count_residency()
        assert counts[Residency.ABSENT_STORE] < CHUNKS
        assert counts[Residency.ABSENT_STORE] + counts[Residency.ZERO] == CHUNKS
        volume = group.add(
            "disk", MemoryDevice(CHUNKS * CHUNK), Geometry(CHUNKS * CHUNK, chunk_size=CHUNK), chunks=chunks
        )
        volume.set_source(Residency.ABSENT_STORE, source)
        await volume.write(10 * CHUNK, b"n" * CHUNK)
        assert source.fetched_chunks == 0
        await volume.write(12 * CHUNK + 100, b"part")
        assert source.fetched_chunks == 1
        expected = bytearray(image)
        expected[10 * CHUNK : 11 * CHUNK] = b"n" * CHUNK
        expected[12 * CHUNK + 100 : 12 * CHUNK + 104] = b"part"
        assert bytes(await volume.read(0, CHUNKS * CHUNK)) == expected


async def cancelling(clock: SimulatedClock) -> None:
    """Callers come, overlap, are cancelled and see errors; whoever gets an answer gets the right one."""
    store, image = await filled_store(clock)
    store.latency_s = 0.1

    def choose(operation):
        return Fault(FaultKind.FAIL) if clock.random.random() < 0.1 else None

    store.choose = choose
    answers = 0

    async def ask(source: StoreSource) -> None:
        nonlocal answers
        await asyncio.sleep(clock.random.uniform(0, 1))
        chunk = clock.random.randrange(0, 40)
        demand = clock.random.random() < 0.3
        try:
            async with asyncio.timeout(clock.random.choice((0.05, 0.15, 100))):
                found = await source.fetch("disk", chunk, demand=demand)
        except (TimeoutError, UnavailableError):
            return
        assert (None if found is None else bytes(found)) == content_of(image, chunk)
        answers += 1

    settings = attrs.evolve(FETCH, background_lanes=2)
    async with source_of(store, clock, settings) as source:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(100):
                tasks.create_task(ask(source))
        assert answers > 20
        assert source._lanes == 2
        assert not source._waiting


def test_cancelled_callers_disturb_nobody() -> None:
    explore(cancelling, seeds=seeds(10))
