"""Filling, invalidating, punching and making durable: what must hold between the map and the device."""

from __future__ import annotations

import asyncio

import pytest

from silo.chunkmap import FROZEN, LOCKED, RESIDENCY_MASK, SYNC_DIRTY, WINDOW, ChunkMap, Residency
from silo.devices.faulty import FaultyDevice, Verb
from silo.devices.memory import MemoryDevice
from silo.errors import FencedError, InvariantError, UnavailableError
from silo.gate import Gate
from silo.geometry import CHUNK_SIZE_MAX, Geometry
from silo.localchunks import INLINE_WRITE, PUNCH_BYTES, PUNCHES_PER_FLUSH
from silo.volume import Volume
from tests.support.held import HeldDevice, everything_else, interleaved
from tests.support.moments import moments
from tests.support.volumes import CHUNK, KeptMaps, chunks_with, make_volume, states

BLOCK = 512
OLD, NEW = b"o" * CHUNK, b"n" * CHUNK
ABSENT, PEER, ZERO, UNPUNCHED, PRESENT = Residency


# ---- filling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", ["", "write"], ids=["fast", "slow"])
@pytest.mark.parametrize("residency", Residency)
async def test_a_fill_never_overwrites(residency, slow):
    """Absent chunks are filled, all others are left as they are; a fill is not a write, so nothing is dirty."""
    device = HeldDevice(CHUNK, slow=slow)
    _, volume = make_volume(device, residency)
    assert await volume.fill(0, NEW) is (residency < ZERO)
    assert (bytes(device.inner.read_nowait(0, CHUNK)) == NEW) is (residency < ZERO)
    assert states(volume) == [PRESENT if residency < ZERO else residency]
    assert chunks_with(volume, SYNC_DIRTY) == []


@pytest.mark.parametrize("content", [None, bytes(CHUNK)])
async def test_filling_with_zeros_costs_nothing(content):
    """The device may hold anything there, and is punched later."""
    device = HeldDevice(CHUNK, slow="write zero")
    _, volume = make_volume(device, PEER)
    assert volume.fill_nowait(0, content)
    assert states(volume) == [UNPUNCHED]
    assert device.log == []
    assert volume.filled_bytes == 0
    assert not await volume.fill(0, None), "it is not absent any more"


async def test_a_run_is_filled_with_zeros_where_it_can_be():
    """Absent chunks that nobody is writing become zero, in one step; all others and all marks stay."""
    _, volume = make_volume(MemoryDevice(6 * CHUNK), PEER)
    assert volume.fill_nowait(1, NEW)
    volume.chunks.states[2] |= LOCKED
    volume.chunks.mark(3, SYNC_DIRTY)
    volume.fill_zeros_nowait(0, 5)
    assert states(volume) == [UNPUNCHED, PRESENT, PEER, UNPUNCHED, UNPUNCHED, PEER]
    assert chunks_with(volume, SYNC_DIRTY) == [3]
    volume.chunks.states[2] &= ~LOCKED & 0xFF
    await volume.flush()
    assert states(volume)[3:5] == [ZERO, ZERO]


async def test_a_synchronous_fill_declines_when_the_device_does():
    """Nothing is decided; the chunk stays absent, and the other form does it."""
    _, volume = make_volume(HeldDevice(CHUNK, slow="write"), ABSENT)
    assert not volume.fill_nowait(0, NEW)
    assert states(volume) == [ABSENT]
    assert await volume.fill(0, NEW)
    assert volume.filled_bytes == CHUNK


async def test_a_large_chunk_is_filled_in_steps():
    """No step is larger than what a file device takes inline; a device that declines one of them is asked again."""
    size = 2 * INLINE_WRITE
    device = HeldDevice(size)
    group, _ = make_volume(MemoryDevice(CHUNK))
    volume = group.add("big", device, Geometry(size, chunk_size=size), chunks=ChunkMap.filled(1, ABSENT))
    data = bytes(range(256)) * (size // 256)
    write = device.write_nowait
    device.write_nowait = lambda offset, part: offset == 0 and write(offset, part)
    assert not volume.fill_nowait(0, data)
    assert volume.chunks.residency(0) is ABSENT
    device.write_nowait = write
    assert volume.fill_nowait(0, data)
    assert device.log == [("write", 0), ("write", 0), ("write", INLINE_WRITE)]
    assert bytes(await volume.read(0, size)) == data


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK + 1])
async def test_a_fill_of_another_length_is_a_bug(length):
    """It would leave bytes of somebody else in the chunk, or overwrite its neighbour's."""
    _, volume = make_volume(MemoryDevice(2 * CHUNK), ABSENT)
    with pytest.raises(InvariantError, match="were offered"):
        volume.fill_nowait(0, b"x" * length)
    assert states(volume) == [ABSENT, ABSENT]


@pytest.mark.parametrize("slow", ["", "write"], ids=["fast", "slow"])
async def test_a_failed_fill_leaves_the_chunk_absent(slow):
    """Half of it is on the device; nobody will read that."""
    device = FaultyDevice(HeldDevice(CHUNK, slow=slow))
    _, volume = make_volume(device, ABSENT)
    device.fail(Verb.WRITE, torn=BLOCK)
    with pytest.raises(UnavailableError):
        await volume.fill(0, NEW)
    assert states(volume) == [ABSENT]
    assert await volume.fill(0, OLD)
    assert bytes(await volume.read(0, CHUNK)) == OLD


# ---- punching -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", ["", "zero"], ids=["fast", "slow"])
async def test_a_flush_punches(slow):
    """Neighbours in one call; the device reads as zeros afterwards, and nothing is punched twice."""
    device = HeldDevice(5 * CHUNK, slow=slow)
    device.inner.write_nowait(0, OLD * 5)
    _, volume = make_volume(device)
    volume.zero_nowait(0, 2 * CHUNK)
    volume.zero_nowait(3 * CHUNK, CHUNK)
    await volume.flush()
    await volume.flush()
    assert device.log == [("zero", 0), ("zero", 3 * CHUNK), ("flush", 0), ("flush", 0)]
    assert states(volume) == [ZERO, ZERO, PRESENT, ZERO, PRESENT]
    assert bytes(device.inner.read_nowait(0, 5 * CHUNK)) == bytes(2 * CHUNK) + OLD + bytes(CHUNK) + OLD


async def test_a_restarted_volume_knows_what_is_to_be_punched():
    """It finds the chunks in the map that it is given."""
    count = WINDOW + 2
    device = HeldDevice(count * CHUNK)
    _, volume = make_volume(device)
    volume.chunks.set_residency(WINDOW + 1, UNPUNCHED)
    again = type(volume)("again", device, volume.geometry, volume.gate, chunks=volume.chunks)
    await again.flush()
    assert device.log == [("zero", (WINDOW + 1) * CHUNK), ("flush", 0)]


async def test_the_last_window_is_punched_to_the_end_of_the_volume_only():
    """The device may be larger, and what is behind the volume is not ours."""
    device = HeldDevice(2 * CHUNK)
    device.inner.write_nowait(0, OLD * 2)
    group, _ = make_volume(MemoryDevice(CHUNK))
    volume = group.add("short", device, Geometry(CHUNK + BLOCK, chunk_size=CHUNK))
    await volume.zero(0, CHUNK + BLOCK)
    await volume.flush()
    assert bytes(device.inner.read_nowait(0, 2 * CHUNK)) == bytes(CHUNK + BLOCK) + OLD[BLOCK:]


async def test_a_cut_keeps_what_it_needs_from_being_punched():
    """S5: zeros for the guest, the old bytes for the cut; the flush after the cut punches."""
    device = HeldDevice(2 * CHUNK)
    group, volume = make_volume(device)
    volume.write_nowait(0, OLD * 2)
    cut = group.take()
    volume.zero_nowait(0, 2 * CHUNK)
    part = cut.volumes["disk"]
    part.release(1)
    await volume.flush()
    assert states(volume) == [UNPUNCHED, ZERO]
    assert bytes(await part.read(0)) == OLD
    assert bytes(await volume.read(0, CHUNK)) == bytes(CHUNK)
    cut.commit()
    await volume.flush()
    assert states(volume) == [ZERO, ZERO]
    assert chunks_with(volume, SYNC_DIRTY) == [0, 1]


async def test_a_partial_write_to_a_frozen_zeroed_chunk():
    """The cut gets the old bytes, the guest its own and zeros around them."""
    for slow in ("", "read write zero"):
        device = HeldDevice(CHUNK, slow=slow)
        group, volume = make_volume(device)
        await volume.write(0, OLD)
        cut = group.take()
        await volume.zero(0, CHUNK)
        await volume.write(BLOCK, NEW[:BLOCK])
        assert bytes(await cut.volumes["disk"].read(0)) == OLD
        assert bytes(await volume.read(0, CHUNK)) == bytes(BLOCK) + NEW[:BLOCK] + bytes(CHUNK - 2 * BLOCK)
        cut.commit()


async def test_a_flush_punches_a_bounded_number_of_runs():
    """A map that is durable says what is zero, so the rest can wait; without one the device itself must be zero."""
    runs = PUNCHES_PER_FLUSH + 3
    for keeper, after_one in ((KeptMaps(), 3), (None, 0)):
        _, volume = make_volume(HeldDevice(2 * runs * CHUNK), keeper=keeper)
        for chunk in range(0, 2 * runs, 2):
            volume.zero_nowait(chunk * CHUNK, CHUNK)
        await volume.flush()
        assert states(volume).count(UNPUNCHED) == after_one
        await volume.punch()
        assert states(volume).count(UNPUNCHED) == 0


async def test_no_device_call_zeroes_more_than_its_share():
    """With large chunks a window is too much for one call: a guest's write would wait for all of it."""
    size = 2 * PUNCH_BYTES + CHUNK_SIZE_MAX
    device = HeldDevice(size, slow="zero")
    group, _ = make_volume(MemoryDevice(CHUNK))
    volume = group.add("big", device, Geometry(size, chunk_size=CHUNK_SIZE_MAX))
    await volume.zero(0, size)
    await volume.flush()
    assert device.log == [("zero", 0), ("zero", PUNCH_BYTES), ("zero", 2 * PUNCH_BYTES), ("flush", 0)]


@interleaved
async def test_a_writer_overtakes_punching():
    """While one run is punched, a later one is written: its bytes stay."""
    device = HeldDevice(4 * CHUNK, slow="zero", hold="zero")
    _, volume = make_volume(device)
    volume.zero_nowait(0, CHUNK)
    volume.zero_nowait(2 * CHUNK, 2 * CHUNK)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.flush())
        punch = await device.next("zero")
        await volume.write(2 * CHUNK, NEW)
        punch.release()
    assert states(volume) == [ZERO, PRESENT, PRESENT, UNPUNCHED]
    assert bytes(await volume.read(2 * CHUNK, CHUNK)) == NEW
    device.hold.clear()
    await volume.flush()
    assert states(volume) == [ZERO, PRESENT, PRESENT, ZERO]


# ---- copying aside --------------------------------------------------------------------------------------


@interleaved
async def test_a_cold_device_is_read_before_it_is_overwritten():
    """The writer reads the old content first, other writers of the chunk wait for it, and it is read once."""
    device = HeldDevice(CHUNK)
    group, volume = make_volume(device)
    volume.write_nowait(0, OLD)
    cut = group.take()
    device.slow, device.hold = {"read"}, {"read"}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW[:BLOCK]))
        copying = await device.next("read")
        tasks.create_task(volume.write(BLOCK, NEW[:BLOCK]))
        zeroing = tasks.create_task(volume.zero(0, CHUNK))
        await everything_else()
        assert not zeroing.done()
        zeroing.cancel()
        copying.release()
    assert cut.copied_bytes == CHUNK
    assert bytes(await cut.volumes["disk"].read(0)) == OLD
    device.hold.clear()
    assert bytes(await volume.read(0, CHUNK)) == NEW[: 2 * BLOCK] + OLD[2 * BLOCK :]
    cut.commit()


@interleaved
async def test_the_uploader_reads_while_the_guest_writes():
    """S4: what the device returns may be new already; the copy counts."""
    device = HeldDevice(CHUNK)
    group, volume = make_volume(device)
    volume.write_nowait(0, OLD)
    cut = group.take()
    device.slow, device.hold = {"read"}, {"read"}
    async with asyncio.TaskGroup() as tasks:
        uploading = tasks.create_task(cut.volumes["disk"].read(0))
        upload = await device.next("read")
        device.slow.clear()
        assert volume.write_nowait(0, NEW)
        upload.release()
    assert bytes(uploading.result()) == OLD
    cut.commit()


@interleaved
async def test_a_copy_for_a_cut_that_has_ended_is_dropped():
    """The next cut has the chunk frozen too: it gets a copy of its own, not one of the old cut's time."""
    device = HeldDevice(CHUNK)
    group, volume = make_volume(device)
    volume.write_nowait(0, OLD)
    first = group.take()
    device.slow, device.hold = {"read"}, {"read"}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW))
        copying = await device.next("read")
        first.abandon()
        second = group.take()
        copying.release()
        await everything_else()
        (await device.next("read")).release()
    assert first.copied_bytes == 0
    assert bytes(await second.volumes["disk"].read(0)) == OLD
    second.commit()


async def test_a_frozen_chunk_without_a_cut_is_a_bug():
    """Nobody could keep its old content."""
    _, volume = make_volume(MemoryDevice(CHUNK))
    volume.chunks.states[0] |= FROZEN
    with pytest.raises(InvariantError, match="no cut"):
        volume.write_nowait(0, NEW)


# ---- durability -----------------------------------------------------------------------------------------


@interleaved
async def test_the_map_is_copied_before_the_flush_and_written_after_it():
    """I5: a chunk that arrives while the device flushes is not in the map that this flush makes durable."""
    keeper = KeptMaps()
    device = HeldDevice(2 * CHUNK, hold="flush")
    _, volume = make_volume(device, ABSENT, keeper=keeper)
    volume.fill_nowait(0, OLD)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.flush())
        flush = await device.next("flush")
        volume.fill_nowait(1, OLD)
        assert keeper.states is None
        flush.release()
    assert keeper.states == bytes([PRESENT, ABSENT])
    device.hold.clear()
    await volume.flush()
    await volume.flush()
    assert keeper.states == bytes([PRESENT, PRESENT])
    assert keeper.count == 2, "a flush after which the map is the same writes none"


async def test_a_flush_of_memory_waits_for_nothing():
    """Unless something is owed that must be waited for: punching, a checkpoint, the flush of somebody else."""
    _, volume = make_volume(MemoryDevice(4 * CHUNK), keeper=KeptMaps())
    assert not volume.flush_nowait(), "nobody knows what a new volume's map was before"
    await volume.flush()
    assert volume.flush_nowait()
    volume.zero_nowait(0, CHUNK)
    assert not volume.flush_nowait(), "the device is to be punched"
    await volume.flush()
    assert volume.flush_nowait()
    volume.chunks.set_residency(1, ABSENT)
    assert volume.fill_nowait(1, OLD)
    assert not volume.flush_nowait(), "the map is to be made durable"
    await volume.flush()
    assert volume.flush_nowait()


async def test_a_flush_that_would_fail_or_wait_is_not_done_at_once():
    """A disk is waited for; a fenced volume must say that it is one, which only `flush` does."""
    _, on_disk = make_volume(HeldDevice(CHUNK))
    assert not on_disk.flush_nowait()
    group, volume = make_volume(MemoryDevice(CHUNK))
    group.gate.fail(FencedError("elsewhere"))
    assert not volume.flush_nowait()


@interleaved
async def test_flushes_share_the_next_turn():
    """All who ask while one is under way are served by one more: theirs must begin after they asked."""
    device = HeldDevice(CHUNK, hold="flush")
    _, volume = make_volume(device)
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(volume.flush())
        flush = await device.next("flush")
        others = [tasks.create_task(volume.flush()) for _ in range(5)]
        await everything_else()
        flush.release()
        await everything_else()
        assert first.done()
        assert not any(other.done() for other in others)
        (await device.next("flush")).release()
    assert device.log == [("flush", 0)] * 2


@interleaved
async def test_a_cancelled_flush_does_not_take_the_others_along():
    """Those who wait for their turn begin another one."""
    device = HeldDevice(CHUNK, hold="flush")
    _, volume = make_volume(device)
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(volume.flush())
        await device.next("flush")
        second = tasks.create_task(volume.flush())
        await everything_else()
        first.cancel()
        (await device.next("flush")).release()
    assert second.done()
    assert device.log == [("flush", 0)]


@pytest.mark.parametrize("failing", ["device", "keeper"])
async def test_a_failed_flush_promises_nothing(failing):
    """It raises; the next one does all of the work again, the map included."""
    keeper = KeptMaps()
    device = FaultyDevice(MemoryDevice(CHUNK))
    _, volume = make_volume(device, ABSENT, keeper=keeper)
    volume.fill_nowait(0, OLD)
    checkpoint = keeper.checkpoint

    async def fail(states):
        raise UnavailableError("no room for the map")

    if failing == "device":
        device.fail(Verb.FLUSH)
    else:
        keeper.checkpoint = fail
    with pytest.raises(UnavailableError):
        await volume.flush()
    keeper.checkpoint = checkpoint
    assert keeper.states is None
    await volume.flush()
    assert keeper.states == bytes([PRESENT])


@pytest.mark.parametrize("residency", [ABSENT, PEER, UNPUNCHED])
async def test_a_first_write_to_another_chunk_needs_a_checkpoint(residency):
    """The last one says that the device does not have it, and would be believed after a power loss."""
    keeper = KeptMaps()
    _, volume = make_volume(HeldDevice(CHUNK, slow="zero"), residency, keeper=keeper)
    volume.chunks.states[0] |= FROZEN  # so that it is not punched
    await volume.flush()
    volume.chunks.states[0] &= ~FROZEN & 0xFF
    volume.write_nowait(0, OLD)
    await volume.flush()
    assert keeper.states == bytes([PRESENT | SYNC_DIRTY])


async def test_a_first_write_to_a_zero_chunk_needs_no_checkpoint():
    """A checkpoint takes ZERO for *as the device has it*, so a fresh disk is flushed without writing maps."""
    keeper = KeptMaps()
    _, volume = make_volume(MemoryDevice(2 * CHUNK), ZERO, keeper=keeper)
    await volume.flush()
    assert keeper.count == 1, "what a process before us may have owed"
    volume.write_nowait(0, OLD)
    await volume.flush()
    assert keeper.count == 1
    volume.zero_nowait(0, CHUNK)
    await volume.flush()
    assert keeper.states == bytes([ZERO | SYNC_DIRTY, ZERO])


def test_killed_at_any_moment_of_zeroing_a_chunk_is_as_before_or_zero_and_dirty():
    """The guest may have read the zeros, so the store must get them; and nothing older may be fetched in between."""
    buffer = bytearray([Residency.PRESENT, Residency.ABSENT_STORE, Residency.ZERO, Residency.ZERO_UNPUNCHED])
    device, chunks = MemoryDevice(4 * CHUNK), ChunkMap(buffer, 4)
    volume = Volume("disk", device, Geometry(device.size, CHUNK), Gate(), chunks=chunks)
    before = bytes(buffer)
    seen = moments(buffer, lambda: volume.zero_nowait(0, 4 * CHUNK))
    assert seen[-1] != before
    for moment in seen:
        for old, state in zip(before, moment, strict=True):
            assert state & RESIDENCY_MASK in {old, ZERO, UNPUNCHED}
            assert state & RESIDENCY_MASK == old or state & SYNC_DIRTY
