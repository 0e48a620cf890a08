"""Whole restores: sparse, in few requests, verified, and refused when they cannot be right."""

from __future__ import annotations

import attrs
import pytest

from silo.chunkmap import ChunkMap, Residency
from silo.devices.memory import MemoryDevice
from silo.errors import CorruptionError, InvalidRequestError, UnavailableError
from silo.sync.claim import Expectation
from silo.sync.codec import digest_of
from silo.sync.committer import volume_infos
from silo.sync.manifest import Manifest
from silo.sync.memory_store import MemoryStore
from silo.sync.reader import StoreReader
from silo.sync.register import Register
from silo.sync.restore import mark_absent, open_newest, restore_volume
from silo.sync.segment import SegmentBuilder, parse_index
from silo.sync.store_faults import Fault, FaultKind, Verb
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, FETCH, RETRY, SETTINGS, make_group, restored, syncing

CHUNKS = 2500


class WatchedDevice(MemoryDevice):
    """Counts what is written and zeroed."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.written = self.zeroed = self.flushes = 0

    async def write(self, offset, data) -> None:
        self.written += len(data)
        await super().write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        self.zeroed += length
        await super().zero(offset, length)

    async def flush(self) -> None:
        self.flushes += 1
        await super().flush()


async def stored_disk(clock: SimulatedClock, *, checkpoint_segments: int = 64) -> tuple[MemoryStore, bytes]:
    """A disk with a run of noise, a hole in it, text far behind, and several generations."""
    store = MemoryStore(clock)
    group = make_group(clock, {"disk": CHUNKS * CHUNK})
    settings = attrs.evolve(SETTINGS, checkpoint_segments=checkpoint_segments)
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        for chunk in range(100):
            await it.write(chunk, clock.token(CHUNK))
        await it.syncer.sync_now()
        await it.disk.zero(40 * CHUNK, 10 * CHUNK)
        for chunk in range(2400, 2406):
            await it.write(chunk, b"text")
            await it.syncer.sync_now()
    store.log.clear()
    return store, it.image()["disk"]


async def restore(store: MemoryStore, clock: SimulatedClock, device: MemoryDevice, **options) -> Manifest:
    reader = StoreReader(store.client(), clock, FETCH)
    manifest = await open_newest(reader, "vm1")
    try:
        await restore_volume(manifest, reader, "disk", device, **options)
    finally:
        manifest.close()
    return manifest


@simulated
async def test_a_restore_is_sparse_and_takes_few_requests(clock: SimulatedClock) -> None:
    """Only what is not zero is written; neighbours come together; progress ends at the size."""
    for checkpoint_segments in (64, 1):
        store, image = await stored_disk(clock, checkpoint_segments=checkpoint_segments)
        device = WatchedDevice(CHUNKS * CHUNK)
        seen: list[tuple[int, int]] = []
        await restore(store, clock, device, progress=lambda *step, seen=seen: seen.append(step))
        assert bytes(await device.read(0, CHUNKS * CHUNK)) == image
        assert device.written == 96 * CHUNK
        assert device.zeroed == 0
        assert device.flushes == 1
        assert seen == sorted(seen)
        assert seen[-1] == (CHUNKS * CHUNK, CHUNKS * CHUNK)
        assert len([operation for operation in store.log if operation.verb is Verb.GET]) < 30


@simulated
async def test_what_the_device_held_before_is_gone(clock: SimulatedClock) -> None:
    """A used disk is zeroed where the volume is zero, and nowhere else."""
    store, image = await stored_disk(clock)
    device = WatchedDevice(CHUNKS * CHUNK)
    await device.write(0, b"\xff" * (CHUNKS * CHUNK))
    await restore(store, clock, device)
    assert bytes(await device.read(0, CHUNKS * CHUNK)) == image
    assert device.zeroed == (CHUNKS - 96) * CHUNK


@simulated
async def test_a_restore_outlives_faults_of_the_store(clock: SimulatedClock) -> None:
    """Failed requests are repeated, damage on the way is read again."""
    store, image = await stored_disk(clock, checkpoint_segments=1)
    kinds = {3: FaultKind.FAIL, 5: FaultKind.CORRUPT, 7: FaultKind.SLOW_DOWN}
    seen = 0

    def choose(operation) -> Fault | None:
        nonlocal seen
        seen += 1
        kind = kinds.get(seen)
        return Fault(kind) if kind and (kind is not FaultKind.CORRUPT or operation.size != 1) else None

    device = MemoryDevice(CHUNKS * CHUNK)
    reader = StoreReader(store.client(), clock, FETCH)
    manifest = await open_newest(reader, "vm1")
    await manifest.load_page("disk", 2, demand=True)
    store.choose = choose
    await restore_volume(manifest, reader, "disk", device)
    manifest.close()
    assert seen > 7
    assert bytes(await device.read(0, CHUNKS * CHUNK)) == image


@simulated
async def test_a_flipped_bit_stops_a_restore(clock: SimulatedClock) -> None:
    """In a chunk, in an index, in a page, in the head: always an error, which says where."""
    store, _ = await stored_disk(clock, checkpoint_segments=1)
    reader = StoreReader(store.client(), clock, FETCH)
    manifest = await open_newest(reader, "vm1")
    await manifest.load_page("disk", 0, demand=True)
    place = manifest.volume("disk").locate(7)
    assert place is not None
    segment = manifest.head.segments[0]
    page = manifest.volume("disk").parts[2]
    manifest.close()
    damages = {
        "chunk 7 of disk": (place.key, place.offset + 9),
        "index": (segment.key, segment.index_offset + 3),
        "page 2": (page.key, page.offset + page.length - 1),
        "head": ("vm1/head", 300),
    }
    for message, (key, at) in damages.items():
        whole = store.snapshot()[key]
        store.place(key, whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CorruptionError, match=message):
            await restore(store, clock, MemoryDevice(CHUNKS * CHUNK))
        store.place(key, whole)
    store.remove(place.key)
    with pytest.raises(CorruptionError, match="missing"):
        await restore(store, clock, MemoryDevice(CHUNKS * CHUNK))


@simulated
async def test_an_unreachable_store_ends_a_restore_in_time(clock: SimulatedClock) -> None:
    store, _ = await stored_disk(clock)
    reader = StoreReader(store.client(), clock, FETCH)
    manifest = await open_newest(reader, "vm1")
    store.offline = True
    before = clock.monotonic()
    with pytest.raises(UnavailableError):
        await restore_volume(manifest, reader, "disk", MemoryDevice(CHUNKS * CHUNK))
    assert clock.monotonic() - before <= FETCH.patience_s
    with pytest.raises(UnavailableError):
        await open_newest(reader, "vm1")
    manifest.close()


@simulated
async def test_what_cannot_be_restored_is_refused(clock: SimulatedClock) -> None:
    """No group, nothing committed, no such volume, a small device, a missing base."""
    store, _ = await stored_disk(clock)
    reader = StoreReader(store.client(), clock, FETCH)
    with pytest.raises(InvalidRequestError, match="no group"):
        await open_newest(reader, "vm2")
    empty = MemoryStore(clock)
    group = make_group(clock)
    register = Register(empty.client(), "vm1", clock, RETRY)
    await register.claim(Expectation.opening(), volumes=volume_infos(group))
    with pytest.raises(InvalidRequestError, match="nothing was committed"):
        await open_newest(StoreReader(empty.client(), clock, FETCH), "vm1")
    manifest = await open_newest(reader, "vm1")
    device = MemoryDevice(CHUNKS * CHUNK)
    with pytest.raises(InvalidRequestError, match="no volume 'ram'"):
        await restore_volume(manifest, reader, "ram", device)
    with pytest.raises(InvalidRequestError, match="only 4096"):
        await restore_volume(manifest, reader, "disk", MemoryDevice(4096))
    builder = SegmentBuilder("vm1", ["disk"])
    builder.add_run("disk", 2000, 2001, base=digest_of(b"base"))
    sealed = builder.seal()
    index = parse_index(sealed.index, index_offset=sealed.index_offset, digest=sealed.index_digest)
    manifest.maps.apply(index, "unused")
    with pytest.raises(InvalidRequestError, match=digest_of(b"base").hex()):
        await restore_volume(manifest, reader, "disk", device)
    manifest.close()


@simulated
async def test_residency_for_a_lazy_restore(clock: SimulatedClock) -> None:
    """Known zeros are zero, everything else is in the store, and other bits of a chunk stay."""
    store, image = await stored_disk(clock)
    reader = StoreReader(store.client(), clock, FETCH)
    manifest = await open_newest(reader, "vm1")
    chunks = ChunkMap.filled(CHUNKS, Residency.PRESENT)
    chunks.mark(7, 0x80)
    for device_is_zero, zero in ((True, Residency.ZERO), (False, Residency.ZERO_UNPUNCHED)):
        mark_absent(manifest, "disk", chunks, device_is_zero=device_is_zero)
        for chunk in range(CHUNKS):
            used = any(image[chunk * CHUNK : (chunk + 1) * CHUNK])
            assert chunks.residency(chunk) is (Residency.ABSENT_STORE if used else zero)
        assert chunks.states[7] & 0x80
    manifest.close()
    assert await restored(store.client(), clock) == {"disk": image}
