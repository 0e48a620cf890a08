"""What a guest sees of a volume: both speeds, every residency, every alignment, and the errors."""

from __future__ import annotations

import random

import pytest

from silo.chunkmap import MIGRATION_DIRTY, SYNC_DIRTY, Residency
from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.memory import MemoryDevice
from silo.errors import InvalidRequestError, InvariantError, UnavailableError
from silo.gate import Gate
from silo.geometry import CHUNK_SIZE_MAX, Geometry
from silo.volume import ZERO_STEP, Volume
from tests.support.held import HeldDevice, interleaved
from tests.support.volumes import CHUNK, DictSource, chunks_with, make_volume, states

BLOCK = 512
OLD, NEW = b"o" * CHUNK, b"n" * CHUNK
ABSENT, PEER, ZERO, UNPUNCHED, PRESENT = Residency
SLOW_AND_FAST = pytest.mark.parametrize("slow", ["", "read write zero"], ids=["fast", "slow"])


# ---- reading --------------------------------------------------------------------------------------------


def test_reads_without_waiting():
    """What is present comes from the device, what is zero from nowhere; absent chunks are a miss."""
    device = HeldDevice(5 * CHUNK)
    _, volume = make_volume(device)
    device.inner.write_nowait(0, OLD * 5)
    for chunk, residency in enumerate(Residency):
        volume.chunks.set_residency(chunk, residency)
    found = [volume.read_nowait(chunk * CHUNK + 5, 7) for chunk in range(5)]
    assert [part and bytes(part) for part in found] == [None, None, bytes(7), bytes(7), OLD[:7]]


@SLOW_AND_FAST
@pytest.mark.parametrize(
    "kinds", [(PRESENT, PRESENT), (PRESENT, ZERO, PRESENT), (PRESENT, UNPUNCHED), (ZERO, UNPUNCHED)]
)
async def test_reads_across_chunks(kinds, slow):
    """Each part is what its chunk holds, at both speeds; stale bytes under a zeroed chunk are never seen."""
    device = HeldDevice(len(kinds) * CHUNK, slow=slow)
    _, volume = make_volume(device)
    expected = bytearray()
    for chunk, kind in enumerate(kinds):
        volume.chunks.set_residency(chunk, kind)
        stale = bytes([chunk + 1]) * CHUNK if kind is not ZERO else bytes(CHUNK)
        device.inner.write_nowait(chunk * CHUNK, stale)
        expected += stale if kind is PRESENT else bytes(CHUNK)
    extent = (100, len(expected) - 300)
    inline = volume.read_nowait(*extent)
    assert (inline is None) == bool(slow and PRESENT in kinds)
    assert bytes(await volume.read(*extent)) == expected[100:-200]


def test_a_device_that_declines_halfway_is_a_miss():
    """A read of several runs is done inline as a whole or not at all."""
    device = HeldDevice(3 * CHUNK)
    _, volume = make_volume(device)
    volume.zero_nowait(CHUNK, CHUNK)
    answers = [b"x" * CHUNK, None]
    device.read_nowait = lambda offset, length: answers.pop(0)
    assert volume.read_nowait(0, 3 * CHUNK) is None


@SLOW_AND_FAST
async def test_reads_hydrate_what_is_absent(slow):
    """Each absent chunk is fetched once, on demand, from the source for its residency."""
    device = HeldDevice(4 * CHUNK, slow=slow)
    _, volume = make_volume(device, ABSENT)
    volume.chunks.set_residency(2, PEER)
    store = DictSource({0: b"0" * CHUNK, 1: None, 3: b"3" * CHUNK})
    peer = DictSource({2: b"2" * CHUNK})
    volume.set_source(ABSENT, store)
    volume.set_source(PEER, peer)
    expected = b"0" * CHUNK + bytes(CHUNK) + b"2" * CHUNK + b"3" * CHUNK
    assert volume.read_nowait(0, 4 * CHUNK) is None
    assert bytes(await volume.read(0, 4 * CHUNK)) == expected
    assert bytes(await volume.read(CHUNK - 1, 2)) == b"0\0"
    assert sorted(store.asked) == [(0, True), (1, True), (3, True)]
    assert peer.asked == [(2, True)]
    assert volume.filled_bytes == 3 * CHUNK


async def test_a_chunk_that_nobody_can_provide_is_a_bug():
    """Zeros would be a lie."""
    _, volume = make_volume(MemoryDevice(CHUNK), PEER)
    with pytest.raises(InvariantError, match="nothing can provide it"):
        await volume.read(0, 1)
    volume.set_source(PEER, DictSource({0: OLD}))
    volume.set_source(PEER, None)
    with pytest.raises(InvariantError):
        await volume.read(0, 1)


# ---- writing --------------------------------------------------------------------------------------------


@SLOW_AND_FAST
async def test_random_requests_agree_with_a_bytearray(slow):
    """All alignments and lengths, with a short last chunk, starting from zeros."""
    size = 9 * CHUNK - 3 * BLOCK
    device = HeldDevice(size, slow=slow)
    _, volume = make_volume(device, ZERO)
    model = bytearray(size)
    chance = random.Random(5)
    for step in range(300):
        first = chance.randrange(size // BLOCK) * BLOCK
        length = min(size - first, chance.choice((1, 2, 8, 9, 30)) * BLOCK)
        extent = slice(first, first + length)
        if step % 3 == 0:
            if not volume.zero_nowait(first, length):
                await volume.zero(first, length)
            model[extent] = bytes(length)
        elif step % 3 == 1:
            data = chance.randbytes(length)
            if not volume.write_nowait(first, data):
                await volume.write(first, data)
            model[extent] = data
        else:
            found = volume.read_nowait(first, length)
            assert (await volume.read(first, length) if found is None else found) == model[extent]
    assert bytes(await volume.read(0, size)) == model


@SLOW_AND_FAST
@pytest.mark.parametrize("residency", Residency)
@pytest.mark.parametrize("extent", [(0, CHUNK), (BLOCK, BLOCK), (0, 2 * CHUNK), (BLOCK, CHUNK)])
async def test_a_write_in_every_residency(residency, extent, slow):
    """The chunk is present afterwards with old bytes around the new ones, and marked; whole chunks are not fetched."""
    device = HeldDevice(2 * CHUNK, slow=slow)
    device.inner.write_nowait(0, b"stale!!!" * (2 * CHUNK // 8))
    if residency is ZERO:
        device.inner.zero_nowait(0, 2 * CHUNK)
    group, volume = make_volume(device, residency)
    source = DictSource({0: OLD, 1: OLD})
    volume.set_source(ABSENT, source)
    volume.set_source(PEER, source)
    group.record_migration(True)
    before = bytearray(
        {ABSENT: OLD, PEER: OLD, PRESENT: b"stale!!!" * (CHUNK // 8)}.get(residency, bytes(CHUNK)) * 2
    )
    offset, length = extent
    data = random.Random(1).randbytes(length)
    await volume.write(offset, data)
    before[offset : offset + length] = data
    touched = list(range(*volume.geometry.touched(offset, length)))
    partial = [chunk for chunk in touched if chunk not in range(*volume.geometry.covered(offset, length))]
    assert [chunk for chunk, _ in source.asked] == (partial if residency < ZERO else [])
    assert chunks_with(volume, SYNC_DIRTY | MIGRATION_DIRTY) == touched
    assert all(states(volume)[chunk] is PRESENT for chunk in touched)
    assert bytes(await volume.read(0, 2 * CHUNK)) == before


def test_what_a_synchronous_write_refuses():
    """It does nothing when something must be waited for."""
    group, volume = make_volume(MemoryDevice(2 * CHUNK), ABSENT)
    assert not volume.write_nowait(0, NEW[:BLOCK]), "the chunk is absent"
    assert volume.write_nowait(0, NEW), "but covered now"
    assert not volume.write_nowait(0, NEW + NEW[:BLOCK])
    group.gate.is_open = False
    assert not volume.write_nowait(0, NEW)
    assert not volume.zero_nowait(0, CHUNK)
    assert volume.read_nowait(0, 1) is None


def test_heat_counts_each_request_once():
    """Reads and writes apart; a request that was declined does not count."""
    device = HeldDevice(3 * CHUNK)
    _, volume = make_volume(device)
    volume.read_nowait(0, 1)
    volume.read_nowait(0, 2 * CHUNK)
    volume.write_nowait(CHUNK, NEW)
    volume.write_nowait(CHUNK, NEW * 2)
    device.slow = {"read", "write"}
    assert volume.read_nowait(0, 1) is None
    assert volume.read_nowait(0, 2 * CHUNK) is None
    assert not volume.write_nowait(0, NEW)
    assert volume.heat.read_heat().tolist() == [2, 1, 0]
    assert volume.heat.write_heat().tolist() == [0, 2, 1]


async def test_heat_counts_a_slow_request_once():
    """The detour through the device's asynchronous calls is one request, too."""
    _, volume = make_volume(HeldDevice(2 * CHUNK, slow="read write"))
    await volume.read(0, 2 * CHUNK)
    await volume.write(0, NEW)
    assert volume.heat.read_heat().tolist() == [1, 1]
    assert volume.heat.write_heat().tolist() == [1, 0]


# ---- zeroing --------------------------------------------------------------------------------------------


@SLOW_AND_FAST
@pytest.mark.parametrize("residency", Residency)
@pytest.mark.parametrize(
    "extent", [(0, CHUNK), (BLOCK, BLOCK), (BLOCK, 2 * CHUNK), (CHUNK // 2, CHUNK), (0, 3 * CHUNK)]
)
async def test_zeroing_in_every_residency(residency, extent, slow):
    """Whole chunks become zero in the map and are never fetched; edges are written with what is around them."""
    device = HeldDevice(3 * CHUNK, slow=slow)
    device.inner.write_nowait(0, bytes(3 * CHUNK) if residency is ZERO else b"stale!!!" * (3 * CHUNK // 8))
    _, volume = make_volume(device, residency)
    source = DictSource(dict.fromkeys(range(3), OLD))
    volume.set_source(ABSENT, source)
    volume.set_source(PEER, source)
    before = bytearray(
        b"".join(bytes(part or bytes(CHUNK)) for part in [await peek(volume, c) for c in range(3)])
    )
    offset, length = extent
    await volume.zero(offset, length)
    before[offset : offset + length] = bytes(length)
    covered = range(*volume.geometry.covered(offset, length))
    assert not set(covered) & {chunk for chunk, _ in source.asked}
    assert all(states(volume)[chunk] is (ZERO if residency is ZERO else UNPUNCHED) for chunk in covered)
    assert bytes(await volume.read(0, 3 * CHUNK)) == before


async def peek(volume: Volume, chunk: int) -> bytes | None:
    """What a chunk holds, without hydrating it."""
    if volume.chunks.residency(chunk) < ZERO:
        return OLD
    return await volume.read_chunk(chunk)


def test_zeroing_marks_what_it_changes():
    """A run that is zero already has nothing to tell the recorders."""
    group, volume = make_volume(MemoryDevice(4 * CHUNK), ZERO)
    assert volume.zero_nowait(0, 4 * CHUNK)
    assert chunks_with(volume, SYNC_DIRTY) == []
    volume.write_nowait(CHUNK, NEW)
    group.take().commit()
    assert volume.zero_nowait(0, 3 * CHUNK)
    assert 1 in chunks_with(volume, SYNC_DIRTY)
    assert states(volume) == [ZERO, UNPUNCHED, ZERO, ZERO]


def test_zeroing_at_once_is_bounded_and_whole():
    """A run that is too long for one step, or that covers a chunk in part, is for the other form."""
    _, volume = make_volume(MemoryDevice((ZERO_STEP + 1) * CHUNK))
    assert not volume.zero_nowait(0, volume.geometry.size)
    assert not volume.zero_nowait(BLOCK, CHUNK)
    assert chunks_with(volume, SYNC_DIRTY) == []


@interleaved
async def test_zeroing_a_whole_disk_lets_others_run():
    """It is done in steps; the last, short chunk counts as covered."""
    size = (ZERO_STEP + 3) * CHUNK - BLOCK
    _, volume = make_volume(MemoryDevice(size))
    await volume.zero(0, size)
    assert volume.chunks.count_residency()[UNPUNCHED] == ZERO_STEP + 3


async def test_trim_leaves_the_edges():
    """Only whole chunks are given up; the rest of the extent keeps its bytes."""
    device = HeldDevice(3 * CHUNK)
    _, volume = make_volume(device)
    device.inner.write_nowait(0, OLD * 3)
    await volume.trim(BLOCK, CHUNK)
    assert states(volume) == [PRESENT] * 3
    await volume.trim(BLOCK, 3 * CHUNK - BLOCK)
    assert states(volume) == [PRESENT, UNPUNCHED, UNPUNCHED]


# ---- refusals and failures ------------------------------------------------------------------------------


async def test_a_read_only_volume():
    """It reads and hydrates, and says no to everything else."""
    _, volume = make_volume(MemoryDevice(2 * CHUNK), ABSENT, read_only=True)
    volume.set_source(ABSENT, DictSource({0: OLD, 1: OLD}))
    assert bytes(await volume.read(0, CHUNK)) == OLD
    for refused in (volume.write(0, NEW), volume.zero(0, CHUNK), volume.trim(0, CHUNK)):
        with pytest.raises(InvalidRequestError, match="read-only"):
            await refused
    assert not volume.write_nowait(0, NEW)
    assert not volume.zero_nowait(0, CHUNK)
    assert bytes(await volume.read(0, CHUNK)) == OLD


def test_device_and_map_must_fit():
    """A device that is too small, or a map of another size, would be noticed in the middle of a write."""
    with pytest.raises(InvalidRequestError, match="are needed"):
        Volume("disk", MemoryDevice(CHUNK), Geometry(2 * CHUNK, chunk_size=CHUNK), Gate())
    _, volume = make_volume(MemoryDevice(CHUNK))
    with pytest.raises(InvalidRequestError, match="1 chunks, not 2"):
        Volume(
            "disk",
            MemoryDevice(2 * CHUNK),
            Geometry(2 * CHUNK, chunk_size=CHUNK),
            Gate(),
            chunks=volume.chunks,
        )


@pytest.mark.parametrize("slow", ["", "write"], ids=["fast", "slow"])
@pytest.mark.parametrize("torn", [0, BLOCK, CHUNK + BLOCK])
@pytest.mark.parametrize("residency", Residency)
async def test_a_failed_write_is_undefined_only_inside(residency, torn, slow):
    """Bytes around the extent keep their value, whatever part of the write happened; the chunks are marked."""
    inner = HeldDevice(3 * CHUNK, slow=slow)
    inner.inner.write_nowait(0, bytes(3 * CHUNK) if residency is ZERO else b"stale!!!" * (3 * CHUNK // 8))
    device = FaultyDevice(inner)
    _, volume = make_volume(device, residency)
    source = DictSource(dict.fromkeys(range(3), OLD))
    volume.set_source(ABSENT, source)
    volume.set_source(PEER, source)
    before = b"".join(bytes(part or bytes(CHUNK)) for part in [await peek(volume, c) for c in range(3)])
    for chunk in (0, 2):
        await volume.read(chunk * CHUNK, 1)  # the edges are here, so that the write is the next device call
    device.fail(Verb.WRITE, torn=torn)
    with pytest.raises(UnavailableError):
        await volume.write(BLOCK, NEW * 2)
    assert device.pending == 0
    assert chunks_with(volume, SYNC_DIRTY) == [0, 1, 2]
    after = bytes(await volume.read(0, 3 * CHUNK))
    assert after[:BLOCK] == before[:BLOCK]
    assert after[BLOCK + 2 * CHUNK :] == before[BLOCK + 2 * CHUNK :]
    await volume.write(CHUNK + BLOCK, NEW[:BLOCK])
    again = bytes(await volume.read(0, 3 * CHUNK))
    assert again == after[: CHUNK + BLOCK] + NEW[:BLOCK] + after[CHUNK + 2 * BLOCK :], "what was read stays"


@pytest.mark.parametrize("chunk_size", [CHUNK, CHUNK_SIZE_MAX])
async def test_large_and_small_chunks(chunk_size):
    """The smallest and the largest chunk behave alike, a short last one included."""
    size = 2 * chunk_size + 3 * BLOCK
    group, _ = make_volume(MemoryDevice(CHUNK))
    volume = group.add("big", MemoryDevice(size), Geometry(size, chunk_size=chunk_size))
    data = random.Random(2).randbytes(chunk_size)
    assert volume.write_nowait(size - chunk_size, data)
    cut = group.take()
    assert cut.volumes["big"].data.tolist() == [1, 2]
    assert volume.zero_nowait(2 * chunk_size, 3 * BLOCK)
    assert bytes(await cut.volumes["big"].read(2)) == data[-3 * BLOCK :]
    cut.commit()
    assert await volume.read_chunk(2) is None
    assert bytes(await volume.read(size - 4 * BLOCK, 4 * BLOCK)) == data[-4 * BLOCK : -3 * BLOCK] + bytes(
        3 * BLOCK
    )
