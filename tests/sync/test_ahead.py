"""Rounds ahead of the cut: what they take, what they leave, and that a commit never says more than is true."""

from __future__ import annotations

import asyncio
from itertools import chain

import attrs
import pytest

from silo.chunkmap import FROZEN, SYNC_DIRTY, SYNC_IN_CUT
from silo.devices.memory import MemoryDevice
from silo.errors import UnavailableError
from silo.geometry import Geometry
from silo.group import CopyLimits
from silo.sync.ahead import Forerunner, Round
from silo.sync.claim import Expectation
from silo.sync.memory_store import MemoryStore
from silo.sync.status import SyncPhase
from silo.sync.store_faults import FaultKind, Verb
from silo.testing.loop import SimulatedClock
from tests.support.logs import ExpectedLogs
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, SETTINGS, make_group, restored, syncing

SMALL = attrs.evolve(
    SETTINGS, cut_size=16 * CHUNK, round_size=64 * CHUNK, segment_size=16 * CHUNK, window=32 * CHUNK
)


async def taken_by(forerunner_group, settings, after=lambda round_: None) -> list[dict[str, list[int]]]:
    """Let a forerunner run whose uploads are only read; what each round had."""
    rounds: list[dict[str, list[int]]] = []

    async def upload(round_: Round) -> None:
        for part in round_.volumes.values():
            await part.capture(part.data.tolist(), memoryview(bytearray(len(part.data) * CHUNK)))
        rounds.append({name: part.data.tolist() for name, part in round_.volumes.items()})
        after(round_)

    await Forerunner(forerunner_group, upload, settings).run(lambda: True)
    return rounds


@simulated
async def test_rounds_are_bounded_and_span_volumes(clock: SimulatedClock) -> None:
    """Every cold chunk comes once, in the order of the disks; nothing is frozen, and it is in-cut then."""
    group = make_group(clock, {"a": 100 * CHUNK, "b": 100 * CHUNK})
    for volume in group.volumes.values():
        await volume.write(0, clock.token(volume.geometry.size))
        volume.heat.write_view[:] = 0
    rounds = await taken_by(group, SMALL)
    assert [sum(map(len, round_.values())) for round_ in rounds] == [64, 64, 64, 8]
    assert [sorted(round_) for round_ in rounds] == [["a"], ["a", "b"], ["b"], ["b"]]
    for name, volume in group.volumes.items():
        assert list(chain.from_iterable(round_.get(name, []) for round_ in rounds)) == list(range(100))
        assert volume.chunks.count_dirty(SYNC_DIRTY) == 0
        assert volume.chunks.count_dirty(SYNC_IN_CUT) == 100
        assert not (volume.chunks.view & FROZEN).any()


@simulated
async def test_the_hottest_are_left_for_the_cut(clock: SimulatedClock) -> None:
    """As many as half a cut holds: they would be written again before it."""
    group = make_group(clock, {"a": 100 * CHUNK})
    (volume,) = group.volumes.values()
    await volume.write(0, clock.token(100 * CHUNK))
    volume.heat.write_view[:] = 0
    volume.heat.write_view[40:48] = 1000
    volume.heat.write_view[60:62] = 10
    await taken_by(group, SMALL)
    assert volume.chunks.select_dirty(SYNC_DIRTY).tolist() == list(range(40, 48))


@simulated
async def test_a_guest_that_is_as_fast_ends_the_rounds(clock: SimulatedClock) -> None:
    """When a pass leaves as much as it found, the cut must do."""
    group = make_group(clock, {"a": 64 * CHUNK})
    (volume,) = group.volumes.values()

    def write_again(round_: Round) -> None:
        assert volume.write_nowait(0, clock.token(64 * CHUNK))
        volume.heat.write_view[:] = 0

    write_again(Round({}))
    assert len(await taken_by(group, SMALL, write_again)) == 1


@simulated
async def test_a_small_dirty_set_needs_no_round(clock: SimulatedClock) -> None:
    """Nor do zeros, however many."""
    group = make_group(clock, {"a": 100 * CHUNK})
    (volume,) = group.volumes.values()
    await volume.write(0, clock.token(100 * CHUNK))
    await volume.zero(16 * CHUNK, 84 * CHUNK)
    assert await taken_by(group, SMALL) == []


@simulated
async def test_a_huge_first_sync_never_holds_the_guest(clock: SimulatedClock) -> None:
    """The guest writes on during rounds without one copy; what is unchanged is referred to without being read again."""
    store = MemoryStore(clock, latency_s=0.05)
    group = make_group(clock, {"disk": 2048 * CHUNK, "other": 64 * CHUNK}, copies=CopyLimits(0, 0))
    device = group.volumes["disk"].device
    reads: list[int] = []
    copy = device.copy_nowait
    images: list[dict[str, bytes]] = []
    async with syncing(store.client(), clock, group=group, settings=SMALL, run=False) as it:
        for volume in group.volumes.values():
            await volume.write(0, clock.token(volume.geometry.size))
            volume.heat.write_view[:] = 0
        take = group.take

        def take_and_look():
            images.append(it.image())
            device.copy_nowait = lambda offset, room: reads.append(offset) or copy(offset, room)
            return take()

        group.take = take_and_look  # type: ignore[method-assign]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(it.syncer.run())
            sync = tasks.create_task(it.syncer.sync_now())
            written = set()
            while not images:
                if it.syncer.status.phase is SyncPhase.AHEAD:
                    chunk = clock.random.randrange(2048)
                    await it.write(chunk, clock.token(CHUNK))
                    written.add(chunk)
                    await it.disk.zero(clock.random.randrange(2048) * CHUNK, CHUNK)
                await asyncio.sleep(0.1)
            assert len(written) > 20
            assert await sync == 1
            assert it.syncer.status.abandoned_cuts == 0
            assert len(reads) < 2 * len(written) + 20
            assert await restored(store.client(), clock) == images[-1]
            assert group.exposed_bytes == 0
            await it.write(7, b"afterwards")
            assert await it.syncer.sync_now() == 2
            assert await restored(store.client(), clock) == it.image()
            await it.syncer.close()


@simulated
async def test_a_round_that_fails_leaves_its_chunks_dirty(
    clock: SimulatedClock, expect_log: ExpectedLogs
) -> None:
    """A disk error in the middle: what was stored is not stored again, and nothing is missing in the end."""
    expect_log("no cut could be taken: .*medium")
    store = MemoryStore(clock)

    class Failing(MemoryDevice):
        broken = True

        def copy_nowait(self, offset: int, into: memoryview) -> bool:
            if self.broken and offset <= 50 * CHUNK < offset + len(into):
                raise UnavailableError("the medium has an error")
            return super().copy_nowait(offset, into)

    group = make_group(clock, {"disk": CHUNK})
    bad = group.add("bad", device := Failing(128 * CHUNK), Geometry(128 * CHUNK, chunk_size=CHUNK))
    async with syncing(store.client(), clock, group=group, settings=SMALL) as it:
        for chunk in range(128):
            await it.write(chunk, clock.token(CHUNK), "bad")
        while not it.syncer.status.error:
            await asyncio.sleep(0.1)
        assert group.cut is None
        assert bad.chunks.count_dirty(SYNC_DIRTY) == 128
        assert it.syncer.status.abandoned_cuts == 0
        device.broken = False
        assert await it.syncer.sync_now() == 1
        assert await restored(store.client(), clock) == it.image()
        assert it.syncer.status.sent_bytes < 128 * CHUNK * 1.05


@simulated
async def test_a_hold_ends_the_rounds_and_takes_no_cut(clock: SimulatedClock) -> None:
    """A migration that begins in the middle; afterwards the rest is uploaded, and nothing twice."""
    store = MemoryStore(clock, latency_s=0.5)
    group = make_group(clock, {"disk": 512 * CHUNK})
    async with syncing(store.client(), clock, group=group, settings=SMALL) as it:
        for chunk in range(512):
            await it.write(chunk, clock.token(CHUNK))
        while it.syncer.status.sent_objects < 6:
            await asyncio.sleep(0.1)
        it.syncer.hold("migration")
        await asyncio.sleep(60)
        status = it.syncer.status
        assert status.phase is SyncPhase.HELD
        assert group.cut is None
        assert status.exposed_bytes == 512 * CHUNK
        assert 0 < status.backlog_bytes < 512 * CHUNK
        it.syncer.release_hold("migration")
        assert await it.syncer.sync_now() == 1
        assert await restored(store.client(), clock) == it.image()
        assert it.syncer.status.sent_bytes < 512 * CHUNK * 1.05


@simulated
async def test_rounds_of_an_earlier_epoch_count_no_more(
    clock: SimulatedClock, expect_log: ExpectedLogs
) -> None:
    """The group was offered and taken back: collectors of the new epoch sweep what the old one has not committed."""
    expect_log("no cut could be taken: the epoch .* changed")
    store = MemoryStore(clock, latency_s=0.5)
    group = make_group(clock, {"disk": 512 * CHUNK})
    async with syncing(store.client(), clock, group=group, settings=SMALL) as it:
        for chunk in range(512):
            await it.write(chunk, clock.token(CHUNK))
        while it.syncer.status.sent_objects < 6:
            await asyncio.sleep(0.1)
        it.syncer.hold("migration")
        owner = it.register.owner
        assert owner is not None
        await it.register.claim(Expectation.opening(owner))
        it.syncer.release_hold("migration")
        await it.syncer.sync_now()
        assert await restored(store.client(), clock) == it.image()
        assert it.register.owner is not None
        epochs = {int(segment.key.split("/")[-1].split("-")[0], 16) for segment in it.head.segments}
        assert epochs == {it.register.owner.epoch} == {2}


@simulated
async def test_rounds_outlive_an_abandoned_cut(clock: SimulatedClock, expect_log: ExpectedLogs) -> None:
    """Its own chunks are dirty again; those uploaded ahead of it are not even read again."""
    expect_log("a cut was abandoned: .*room")
    store = MemoryStore(clock, latency_s=0.1)
    group = make_group(clock, {"disk": 256 * CHUNK}, copies=CopyLimits(0, 0))
    async with syncing(store.client(), clock, group=group, settings=SMALL) as it:
        for chunk in range(256):
            await it.write(chunk, clock.token(CHUNK))
        it.disk.heat.write_view[100:108] = 1000
        while group.cut is None:
            await asyncio.sleep(0.01)
        assert group.cut.volumes["disk"].data.tolist() == list(range(100, 108))
        store.inject(FaultKind.HOLD, Verb.PUT_IF, key="*/segments/*", times=None)
        group.cut.overflow()
        while not it.syncer.status.abandoned_cuts:
            await asyncio.sleep(0.01)
            store.release_held()
        assert it.disk.chunks.select_dirty(SYNC_DIRTY).tolist() == list(range(100, 108))
        assert it.disk.chunks.count_dirty(SYNC_IN_CUT) == 248
        store.rules.clear()
        store.release_held()
        assert await it.syncer.sync_now() == 1
        assert await restored(store.client(), clock) == it.image()
    assert group.exposed_bytes == 0


@simulated
async def test_closing_in_the_middle_of_a_round_leaves_everything_dirty(clock: SimulatedClock) -> None:
    """Nothing that was not committed counts as stored for whoever opens the group next."""
    store = MemoryStore(clock, latency_s=0.5)
    group = make_group(clock, {"disk": 512 * CHUNK})
    async with syncing(store.client(), clock, group=group, settings=SMALL, drain=False) as it:
        for chunk in range(512):
            await it.write(chunk, clock.token(CHUNK))
        while it.syncer.status.sent_objects < 6:
            await asyncio.sleep(0.1)
    assert it.disk.chunks.count_dirty(SYNC_DIRTY) == 512
    assert it.disk.chunks.count_dirty(SYNC_IN_CUT) == 0
    async with syncing(
        store.client(), clock, group=group, settings=SMALL, expectation=Expectation.force()
    ) as it:
        await it.syncer.sync_now()
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_bits_of_a_dead_process_are_not_taken_for_uploads(clock: SimulatedClock) -> None:
    """A new syncer knows of no round: what claims to be uploaded is dirty."""
    store = MemoryStore(clock)
    group = make_group(clock, {"disk": 4 * CHUNK})
    await group.volumes["disk"].write(0, b"x" * 4 * CHUNK)
    chunks = group.volumes["disk"].chunks
    assert group.volumes["disk"].take_ahead(1)
    assert chunks.count_dirty(SYNC_DIRTY) == 3
    async with syncing(store.client(), clock, group=group) as it:
        await it.syncer.sync_now()
        assert await restored(store.client(), clock) == it.image()


@pytest.mark.parametrize("wrong", [{"cut_size": 0}, {"round_size": 0}])
def test_impossible_sizes_are_refused(wrong) -> None:
    """They are settings of the syncer."""
    with pytest.raises(ValueError, match="cannot be empty"):
        attrs.evolve(SETTINGS, **wrong)
