"""Two requests on one chunk, in the orders that hurt."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from silo.chunkmap import LOCKED, SYNC_DIRTY, Residency
from silo.errors import FencedError, UnavailableError
from tests.support.held import HeldDevice, everything_else, interleaved
from tests.support.volumes import CHUNK, DictSource, chunks_with, make_volume, states

BLOCK = 512
OLD, NEW, NEWER = b"o" * CHUNK, b"n" * CHUNK, b"r" * CHUNK


@interleaved
async def test_zeroing_is_not_undone_by_a_write_that_began_before():
    """A write of one block, in its device phase while the chunk is zeroed, must not bring back its neighbours."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    device.inner.write_nowait(0, OLD)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW[:BLOCK]))
        write = await device.next("write")
        zeroed = tasks.create_task(volume.zero(0, CHUNK))
        await everything_else()
        assert not volume.zero_nowait(0, CHUNK)
        write.release()
    assert zeroed.done()
    assert bytes(await volume.read(BLOCK, CHUNK - BLOCK)) == bytes(CHUNK - BLOCK)


@interleaved
async def test_a_punched_chunk_is_zero_on_the_device_also_after_a_write_that_began_before():
    """ZERO in the map means zeros on the device: a write under way when the chunk is zeroed must have landed."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    device.inner.write_nowait(0, OLD)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW[:BLOCK]))
        write = await device.next("write")

        async def zero_and_flush():
            await volume.zero(0, CHUNK)
            await volume.flush()

        tasks.create_task(zero_and_flush())
        await everything_else()
        write.release()
    assert states(volume) == [Residency.ZERO]
    assert bytes(device.inner.read_nowait(0, CHUNK)) == bytes(CHUNK)


@interleaved
async def test_slow_writes_to_one_present_chunk_overlap():
    """Writes of different blocks of a chunk do not wait for one another, and zeroing waits for all of them."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    _, volume = make_volume(device)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW[:BLOCK]))
        first = await device.next("write")
        tasks.create_task(volume.write(BLOCK, NEW[:BLOCK]))
        second = await device.next("write")
        zeroed = tasks.create_task(volume.zero(0, CHUNK))
        first.release()
        await everything_else()
        assert not zeroed.done()
        second.release()
    assert states(volume) == [Residency.ZERO_UNPUNCHED]


@interleaved
async def test_a_chunk_is_dirty_while_a_write_to_it_is_under_way():
    """The cut may have read it before the write lands, and the process may die before the write marks it again."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    group, volume = make_volume(device)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW))
        write = await device.next("write")
        cut = group.take()
        assert cut.volumes["disk"].data.tolist() == [0]
        cut.volumes["disk"].release(0)
        cut.commit()
        assert chunks_with(volume, SYNC_DIRTY) == [0]
        write.release()
    assert chunks_with(volume, SYNC_DIRTY) == [0]


@interleaved
async def test_a_write_marks_again_for_a_migration_that_looked_meanwhile():
    """The round that took the chunk may have copied it before the write landed."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    group, volume = make_volume(device)
    group.record_migration(True)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW))
        write = await device.next("write")
        assert group.take_migration()["disk"].tolist() == [0]
        write.release()
    assert group.take_migration()["disk"].tolist() == [0]


@interleaved
async def test_a_write_is_marked_however_it_came_to_the_device():
    """The fast path met an obstacle, and the slow path removes it in passing: the mark comes first all the same."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    _, volume = make_volume(device, Residency.ZERO_UNPUNCHED)
    answers = [False, True]
    zero = device.zero_nowait
    device.zero_nowait = lambda offset, length: answers.pop(0) and zero(offset, length)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW[:BLOCK]))
        write = await device.next("write")
        assert chunks_with(volume, SYNC_DIRTY) == [0]
        write.release()
    assert answers == []


@interleaved
async def test_a_flush_does_not_punch_what_is_being_written():
    """A chunk that is zero in the map still, with a covering write in its device phase."""
    device = HeldDevice(CHUNK, slow="write", hold="write flush")
    _, volume = make_volume(device, Residency.ZERO_UNPUNCHED)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW))
        write = await device.next("write")
        tasks.create_task(volume.flush())
        flush = await device.next("flush")
        assert device.log == []
        write.release()
        flush.release()
    assert bytes(await volume.read(0, CHUNK)) == NEW


@interleaved
async def test_invalidation_waits_for_every_fill():
    """A fill that begins while an invalidation waits for another one must not survive it."""
    device = HeldDevice(2 * CHUNK, slow="write", hold="write")
    _, volume = make_volume(device, Residency.ABSENT_PEER)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.fill(0, OLD))
        first = await device.next("write")
        invalidated = tasks.create_task(volume.invalidate(0, 2, Residency.ABSENT_PEER))
        await everything_else()
        tasks.create_task(volume.fill(1, OLD))
        second = await device.next("write")
        first.release()
        await everything_else()
        assert not invalidated.done()
        second.release()
    assert states(volume) == [Residency.ABSENT_PEER] * 2


@interleaved
async def test_a_fetch_that_began_before_an_invalidation_is_not_used():
    """The chunk is absent before and after; what was fetched is older than the invalidation all the same."""
    fetching, answered = asyncio.Event(), asyncio.Event()

    class Source(DictSource):
        async def before_answer(self, chunk, demand):
            if len(self.asked) == 1:
                fetching.set()
                await answered.wait()

        async def fetch(self, volume, chunk, *, demand):
            content = self.content[chunk]
            await super().fetch(volume, chunk, demand=demand)
            return content

    source = Source({0: OLD})
    _, volume = make_volume(HeldDevice(CHUNK), Residency.ABSENT_STORE)
    volume.set_source(Residency.ABSENT_STORE, source)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.hydrate(0))
        await fetching.wait()
        await volume.invalidate(0, 1, Residency.ABSENT_STORE)
        source.content[0] = NEW
        answered.set()
    assert bytes(await volume.read(0, CHUNK)) == NEW
    assert len(source.asked) == 2


@interleaved
async def test_a_fetch_from_the_wrong_place_is_not_used():
    """While the store answers, the handover says that only the peer has the newest content."""
    store, peer = DictSource({0: OLD}), DictSource({0: NEW})
    fetching, answered = asyncio.Event(), asyncio.Event()

    async def wait(chunk, demand):
        fetching.set()
        await answered.wait()

    store.before_answer = wait
    _, volume = make_volume(HeldDevice(CHUNK), Residency.ABSENT_STORE)
    volume.set_source(Residency.ABSENT_STORE, store)
    volume.set_source(Residency.ABSENT_PEER, peer)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.hydrate(0))
        await fetching.wait()
        volume.chunks.set_residency(0, Residency.ABSENT_PEER)
        answered.set()
    assert bytes(await volume.read(0, CHUNK)) == NEW


@interleaved
async def test_a_fill_that_met_another_writer_is_not_used_later():
    """A fill that waited for another one, and then for an invalidation, would be older than both."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    _, volume = make_volume(device, Residency.ABSENT_PEER)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.fill(0, NEW))
        newer = await device.next("write")
        older = tasks.create_task(volume.fill(0, OLD))
        tasks.create_task(volume.invalidate(0, 1, Residency.ABSENT_PEER))
        await everything_else()
        newer.release()
        await everything_else()
        device.hold.clear()
    assert older.result() is False
    assert states(volume) == [Residency.ABSENT_PEER]


@interleaved
async def test_the_guest_wins_against_a_fill():
    """A covering write to an absent chunk is in its device phase: the fill that comes then does nothing."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    _, volume = make_volume(device, Residency.ABSENT_STORE)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW))
        write = await device.next("write")
        assert volume.fill_nowait(0, OLD) is False
        fill = tasks.create_task(volume.fill(0, OLD))
        await everything_else()
        write.release()
    assert fill.result() is False
    assert bytes(await volume.read(0, CHUNK)) == NEW


@interleaved
async def test_the_guest_waits_for_a_fill_and_wins():
    """A covering write that meets a fill in its device phase comes after it."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    _, volume = make_volume(device, Residency.ABSENT_STORE)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.fill(0, OLD))
        fill = await device.next("write")
        tasks.create_task(volume.write(0, NEW))
        await everything_else()
        assert device.log == []
        fill.release()
        (await device.next("write")).release()
    assert bytes(await volume.read(0, CHUNK)) == NEW


@interleaved
async def test_a_partial_write_hydrates_and_a_covering_one_overtakes_it():
    """S1: the hydration finds the chunk covered meanwhile; both writes end up on it."""
    fetching, answered = asyncio.Event(), asyncio.Event()

    class Source(DictSource):
        async def before_answer(self, chunk, demand):
            fetching.set()
            await answered.wait()

    _, volume = make_volume(HeldDevice(CHUNK), Residency.ABSENT_STORE)
    volume.set_source(Residency.ABSENT_STORE, Source({0: OLD}))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEWER[:BLOCK]))
        await fetching.wait()
        await volume.write(0, NEW)
        answered.set()
    assert bytes(await volume.read(0, CHUNK)) == NEWER[:BLOCK] + NEW[BLOCK:]


@interleaved
async def test_zeroing_overtakes_a_hydration():
    """TRIM of a chunk that is being fetched is served at once, and what was fetched does not undo it."""
    fetching, answered = asyncio.Event(), asyncio.Event()

    class Source(DictSource):
        async def before_answer(self, chunk, demand):
            fetching.set()
            await answered.wait()

    _, volume = make_volume(HeldDevice(CHUNK), Residency.ABSENT_STORE)
    volume.set_source(Residency.ABSENT_STORE, Source({0: OLD}))
    async with asyncio.TaskGroup() as tasks:
        read = tasks.create_task(volume.read(0, BLOCK))
        await fetching.wait()
        assert volume.zero_nowait(0, CHUNK)
        answered.set()
    assert bytes(read.result()) == bytes(BLOCK)
    assert states(volume) == [Residency.ZERO_UNPUNCHED]


@interleaved
async def test_a_partial_write_waits_for_the_punch_before_it():
    """The rest of a chunk that was zeroed must be zero on the device before a part of it is written."""
    device = HeldDevice(CHUNK, slow="zero", hold="zero")
    _, volume = make_volume(device)
    device.inner.write_nowait(0, OLD)
    assert volume.zero_nowait(0, CHUNK)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, NEW[:BLOCK]))
        punch = await device.next("zero")
        other = tasks.create_task(volume.write(BLOCK, NEW[:BLOCK]))
        covering = tasks.create_task(volume.write(0, NEWER))
        await everything_else()
        assert not other.done()
        assert not covering.done()
        covering.cancel()
        punch.release()
    assert bytes(await volume.read(0, CHUNK)) == NEW[: 2 * BLOCK] + bytes(CHUNK - 2 * BLOCK)


@interleaved
async def test_closing_the_gate_waits_for_the_device_phase_only():
    """The write on the device ends and is acknowledged; the one that waits for a source waits at the gate."""
    answered = asyncio.Event()

    class Source(DictSource):
        async def before_answer(self, chunk, demand):
            await answered.wait()

    device = HeldDevice(2 * CHUNK, slow="write", hold="write")
    group, volume = make_volume(device)
    volume.chunks.set_residency(1, Residency.ABSENT_STORE)
    volume.set_source(Residency.ABSENT_STORE, Source({1: None}))
    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(volume.write(0, NEW))
        write = await device.next("write")
        hydrating = tasks.create_task(volume.write(CHUNK, NEW[:BLOCK]))
        await everything_else()
        drained = tasks.create_task(group.gate.close_and_drain())
        await everything_else()
        assert not drained.done()
        write.release()
        await drained
        await writing
        answered.set()
        await everything_else()
        assert not hydrating.done()
        device.hold.clear()
        group.gate.reopen()
    assert bytes(await volume.read(CHUNK, CHUNK)) == NEW[:BLOCK] + bytes(CHUNK - BLOCK)


@interleaved
async def test_closing_the_gate_does_not_wait_for_fills_and_punches():
    """They do not change what the volume reads as, and zeroing a large extent may take long."""
    device = HeldDevice(2 * CHUNK, slow="write zero", hold="write zero")
    group, volume = make_volume(device, Residency.ABSENT_STORE)
    volume.fill_zeros_nowait(1, 2)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.fill(0, OLD))
        fill = await device.next("write")
        tasks.create_task(volume.write(CHUNK, NEW[:BLOCK]))
        await everything_else()
        punch = await device.next("zero")
        async with asyncio.timeout(1):
            await group.gate.close_and_drain()
        fill.release()
        punch.release()
        await everything_else()
        device.hold.clear()
        group.gate.reopen()
    assert bytes(await volume.read(0, 2 * CHUNK)) == OLD + NEW[:BLOCK] + bytes(CHUNK - BLOCK)


@interleaved
async def test_fencing_ends_whatever_waits():
    """A request that waits at the gate and one that waits for a lock end with the gate's error."""
    device = HeldDevice(CHUNK, slow="write", hold="write")
    group, volume = make_volume(device, Residency.ZERO)
    results = []

    async def write():
        try:
            await volume.write(0, NEW)
        except FencedError:
            results.append("fenced")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(volume.write(0, OLD))
        held = await device.next("write")
        tasks.create_task(write())
        await everything_else()
        group.gate.fail(FencedError("epoch 7 belongs to another host"))
        held.release()
        tasks.create_task(write())
    assert results == ["fenced", "fenced"]
    with pytest.raises(FencedError):
        await volume.read(0, BLOCK)


@interleaved
async def test_a_failed_flush_keeps_what_it_owes():
    """A punch that fails fails the flush; the next flush punches, and then makes the map durable."""
    device = HeldDevice(2 * CHUNK, slow="zero")
    _, volume = make_volume(device)
    volume.zero_nowait(0, CHUNK)

    async def fail(offset, length):
        raise UnavailableError("not now")

    zero, device.zero = device.zero, fail
    with pytest.raises(UnavailableError):
        await volume.flush()
    device.zero = zero
    await volume.flush()
    assert states(volume) == [Residency.ZERO, Residency.PRESENT]


@interleaved
async def test_a_cancelled_flush_keeps_what_it_owes():
    """A flush that is cancelled while it punches owes the rest to the next one."""
    device = HeldDevice(CHUNK, slow="zero", hold="zero")
    _, volume = make_volume(device)
    volume.zero_nowait(0, CHUNK)
    async with asyncio.TaskGroup() as tasks:
        flush = tasks.create_task(volume.flush())
        await device.next("zero")
        flush.cancel()
    assert states(volume) == [Residency.ZERO_UNPUNCHED]
    device.hold.clear()
    await volume.flush()
    assert states(volume) == [Residency.ZERO]


@interleaved
async def test_cancellation_unlocks():
    """A write, a fill and a punch that are cancelled on the device leave no lock behind."""
    for residency, start in (
        (Residency.ZERO, lambda volume: volume.write(0, NEW)),
        (Residency.PRESENT, lambda volume: volume.write(0, NEW)),
        (Residency.ABSENT_STORE, lambda volume: volume.write(0, NEW)),
        (Residency.ABSENT_STORE, lambda volume: volume.fill(0, NEW)),
        (Residency.ZERO_UNPUNCHED, lambda volume: volume.flush()),
    ):
        device = HeldDevice(CHUNK, slow="write zero", hold="write zero")
        group, volume = make_volume(device, residency)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(start(volume))
            await everything_else()
            waiter = tasks.create_task(volume.zero(0, CHUNK))
            await everything_else()
            task.cancel()
        assert waiter.done()
        assert not np.any(volume.chunks.view & LOCKED)
        await group.gate.close_and_drain()


@interleaved
async def test_a_failed_write_to_a_zero_chunk_leaves_it_zero():
    """Half of the write is on the device: the chunk reads as zeros still, and is punched before it is used."""
    device = HeldDevice(CHUNK, slow="write")
    _, volume = make_volume(device, Residency.ZERO)

    async def torn(offset, data):
        device.inner.write_nowait(offset, data[:BLOCK])
        raise UnavailableError("pulled out")

    write, device.write = device.write, torn
    with pytest.raises(UnavailableError):
        await volume.write(0, NEW[: 2 * BLOCK])
    device.write = write
    assert bytes(await volume.read(0, CHUNK)) == bytes(CHUNK)
    await volume.write(4 * BLOCK, NEW[:BLOCK])
    assert bytes(await volume.read(0, CHUNK)) == bytes(4 * BLOCK) + NEW[:BLOCK] + bytes(3 * BLOCK)
