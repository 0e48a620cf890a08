"""The syncer end to end over a scripted store: what is committed is a whole cut, whatever goes wrong."""

from __future__ import annotations

import asyncio

import attrs
import numpy as np
import pytest

from silo.chunkmap import Residency
from silo.devices.memory import MemoryDevice
from silo.errors import (
    CapacityError,
    ClosedError,
    FencedError,
    InvalidRequestError,
    InvariantError,
    UnavailableError,
)
from silo.geometry import Geometry
from silo.group import CopyLimits
from silo.sync.claim import Expectation
from silo.sync.head import PartRef, WriterState, encode_head, parse_head
from silo.sync.memory_store import MemoryStore
from silo.sync.status import SyncPhase
from silo.sync.store_faults import FaultKind, Outcome, Verb
from silo.sync.syncer import Syncer
from silo.testing.loop import SimulatedClock
from tests.support.logs import ExpectedLogs
from tests.support.simulated import simulated
from tests.support.sync import CHUNK, SETTINGS, make_group, mark_all_dirty, restored, syncing


def stored_head(store: MemoryStore):
    return parse_head(store.snapshot()["vm1/head"], "vm1")


def puts(store: MemoryStore) -> list[str]:
    """The keys of all uploads so far, shortened."""
    verbs = (Verb.PUT, Verb.PUT_IF)
    return [operation.key.split("/")[1] for operation in store.log if operation.verb in verbs]


@simulated
async def test_what_was_written_is_restored(clock: SimulatedClock) -> None:
    """Data, text, zeros, a trim and two volumes: the store gives back what the guest saw."""
    store = MemoryStore(clock)
    group = make_group(clock, {"disk": 40 * CHUNK + 512, "ram": 2 * CHUNK})
    async with syncing(store.client(), clock, group=group) as it:
        await it.write(3, b"three")
        await it.write(4, clock.token(CHUNK))
        await it.disk.write(40 * CHUNK, b"e" * 512)
        await it.write(1, b"\0")
        await it.write(1, b"memory", "ram")
        assert await it.syncer.sync_now() == 1
        assert await restored(store.client(), clock) == it.image()
        await it.disk.zero(0, 4 * CHUNK)
        await it.write(20, b"later")
        assert await it.syncer.sync_now() == 2
        assert await restored(store.client(), clock) == it.image()
        image = it.image()
    assert await restored(store.client(), clock) == image


@simulated
async def test_a_steady_cut_costs_two_puts_and_an_idle_one_none(clock: SimulatedClock) -> None:
    """One segment, one head; and silence when nothing was written."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        for chunk in range(20):
            await it.write(chunk, clock.token(CHUNK))
        await it.syncer.sync_now()
        await asyncio.sleep(100)
        assert puts(store) == ["head", "segments", "head"]
        requests = len(store.log)
        await asyncio.sleep(1000)
        assert len(store.log) == requests
        assert it.syncer.status.rpo_s <= SETTINGS.rpo_s
        assert it.syncer.status.cuts > 100
    assert puts(store) == ["head", "segments", "head", "head"]
    assert stored_head(store).state is WriterState.RELEASED


@simulated
async def test_unchanged_and_zero_chunks_cost_nothing(clock: SimulatedClock) -> None:
    """Writing what is there already is recognised, before and after a restart; zeros are an entry without bytes."""
    store = MemoryStore(clock)
    group = make_group(clock)
    async with syncing(store.client(), clock, group=group) as it:
        for chunk in range(8):
            await it.write(chunk, b"same")
        await it.syncer.sync_now()
        sent = it.syncer.status.sent_bytes
        for chunk in range(8):
            await it.write(chunk, b"same")
        assert await it.syncer.sync_now() == 1
        assert it.syncer.status.sent_bytes == sent
        assert it.syncer.status.elided_chunks == 8
        await it.disk.zero(0, 3 * CHUNK)
        await it.write(3, b"\0")
        assert await it.syncer.sync_now() == 2
        assert it.syncer.status.sent_bytes - sent < 300
        await it.disk.zero(0, 2 * CHUNK)
        await it.disk.zero(40 * CHUNK, 5 * CHUNK)
        assert await it.syncer.sync_now() == 2
    mark_all_dirty(group)
    async with syncing(store.client(), clock, group=group) as it:
        assert await it.syncer.sync_now() == 2
        assert it.syncer.status.sent_bytes == 0
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_writes_during_the_upload_are_not_in_the_cut(clock: SimulatedClock) -> None:
    """The image of a generation is the one of its instant, on all volumes, however long the upload takes."""
    store = MemoryStore(clock, latency_s=0.2)
    group = make_group(clock, {"disk": 32 * CHUNK, "ram": 32 * CHUNK})
    images: dict[int, dict[str, bytes]] = {}
    async with syncing(store.client(), clock, group=group) as it:
        take = group.take

        def take_and_look():
            images[len(images)] = it.image()
            return take()

        group.take = take_and_look  # type: ignore[method-assign]
        for round_ in range(5):
            async with asyncio.TaskGroup() as tasks:
                sync = tasks.create_task(it.syncer.sync_now())
                while not sync.done():
                    number = clock.random.randrange(32)
                    name = clock.random.choice(["disk", "ram"])
                    if clock.random.random() < 0.2:
                        await it.group.volumes[name].zero(number * CHUNK, CHUNK)
                    else:
                        await it.write(number, clock.token(CHUNK), name)
                    await asyncio.sleep(0.01)
            assert await restored(store.clone().client(), clock) in images.values(), f"round {round_}"
        assert len(images) >= 5


@simulated
async def test_the_rpo_drives_the_cuts(clock: SimulatedClock) -> None:
    """Under a steady load the newest generation stays younger than the target, with a slow store too."""
    store = MemoryStore(clock, latency_s=0.5)
    async with syncing(store.client(), clock) as it:
        worst = 0.0
        for number in range(600):
            await it.write(number % 64, str(number).encode())
            await asyncio.sleep(0.1)
            if it.syncer.generation > 1:  # by then it knows how long a commit takes
                worst = max(worst, it.syncer.status.rpo_s)
        assert SETTINGS.rpo_s / 2 < worst <= SETTINGS.rpo_s
        assert 12 <= it.syncer.generation <= 25


@simulated
async def test_a_lost_answer_makes_no_second_object(clock: SimulatedClock) -> None:
    """A segment that was created without an answer is recognised as ours; so is a head."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        store.inject(FaultKind.LOSE_RESPONSE, Verb.PUT_IF, key="*/segments/*")
        store.inject(FaultKind.LOSE_RESPONSE, Verb.PUT_IF, key="*/head")
        await it.write(1, b"one")
        assert await it.syncer.sync_now() == 1
        assert len(it.head.segments) == 1
        assert await restored(store.client(), clock) == it.image()
    assert sum("segments" in key for key in store.snapshot()) == 1


@simulated
async def test_a_delayed_put_lands_late_and_changes_nothing(clock: SimulatedClock) -> None:
    """Old attempts at a segment and at a head arrive after newer generations."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        store.inject(FaultKind.LATE, Verb.PUT_IF, key="*/segments/*")
        store.inject(FaultKind.LATE, Verb.PUT_IF, key="*/head")
        await it.write(1, b"one")
        await it.syncer.sync_now()
        await it.write(1, b"two")
        await it.syncer.sync_now()
        before = store.snapshot()
        assert {operation.outcome for operation in store.land_late()} == {Outcome.LATE_REFUSED}
        assert store.snapshot() == before
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_an_outage_is_visible_and_loses_nothing(clock: SimulatedClock) -> None:
    """Errors and a long silence: the status says why, the RPO grows, and then everything is stored."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        await it.write(0, b"before")
        await it.syncer.sync_now()
        store.offline = True
        await it.write(1, b"during")
        await asyncio.sleep(300)
        await it.write(2, b"later")
        status = it.syncer.status
        assert status.phase is SyncPhase.UPLOADING
        assert "did not answer" in status.error
        assert status.attempts > 10
        assert 280 < status.rpo_s < 320
        assert status.failing_s > 280
        assert status.exposed_bytes == 2 * CHUNK
        assert status.generation == 1
        store.offline = False
        assert await it.syncer.sync_now() == 3
        assert await restored(store.client(), clock) == it.image()
        status = it.syncer.status
        assert (status.error, status.exposed_bytes) == ("", 0)
        assert status.rpo_s < 1


async def be_refused(clock: SimulatedClock, key: str) -> None:
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        await it.write(0, b"before")
        await it.syncer.sync_now()
        rule = store.inject(FaultKind.REFUSE, Verb.PUT_IF, Verb.GET, key=key, times=None)
        await it.write(1, b"during")
        await asyncio.sleep(600)
        await it.write(2, b"later")
        status = it.syncer.status
        assert "access denied" in status.error
        assert 590 < status.rpo_s < 620
        assert 20 < status.attempts < 60
        assert stored_head(store).generation == 1
        store.rules.remove(rule)
        assert await it.syncer.sync_now() == 3
        assert await restored(store.client(), clock) == it.image()
        assert it.syncer.status.error == ""


@simulated
async def test_a_refused_segment_is_visible_and_ends_nothing(clock: SimulatedClock) -> None:
    """Rights that are taken away while a group is synced: an alarm, patience, and all of it stored when they return."""
    await be_refused(clock, "*/segments/*")


@simulated
async def test_a_refused_head_is_visible_and_ends_nothing(clock: SimulatedClock) -> None:
    """The same for the register, whose outstanding attempt stays the only one."""
    await be_refused(clock, "*/head")


@simulated
async def test_a_cut_that_outgrows_its_copies_is_abandoned_visibly(
    clock: SimulatedClock, expect_log: ExpectedLogs
) -> None:
    """The guest never waits for room; the next cut takes everything, and what was uploaded is used again."""
    expect_log("a cut was abandoned: .*room")
    store = MemoryStore(clock)
    group = make_group(clock, {"disk": 1024 * CHUNK}, copies=CopyLimits(memory=8 * CHUNK, spill=0))
    settings = attrs.evolve(SETTINGS, window=1 << 20, batch_size=16 * CHUNK)
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        for chunk in range(1024):
            await it.write(chunk, clock.token(CHUNK))
        # One full segment gets through; then the store is silent, and the guest overwrites what is waiting.
        store.inject(FaultKind.FAIL, Verb.PUT_IF, key="*/segments/*", skip=1, times=None)
        async with asyncio.TaskGroup() as tasks:
            sync = tasks.create_task(it.syncer.sync_now())
            while it.syncer.status.attempts < 2:
                await asyncio.sleep(0.1)
            frozen = np.flatnonzero(it.disk.chunks.view & 0x10)
            assert len(frozen) > 8
            for chunk in frozen[:9].tolist():
                await it.write(chunk, b"new")
            while not it.syncer.status.abandoned_cuts:
                await asyncio.sleep(0.1)
            assert it.group.exposed_bytes == 1024 * CHUNK
            store.rules.clear()
            assert await sync == 1
        assert await restored(store.client(), clock) == it.image()
        sizes = [len(data) for key, data in store.snapshot().items() if "segments" in key]
        used = {segment.key for segment in it.head.segments}
        assert sum(len(store.snapshot()[key]) for key in used) < 1030 * CHUNK + 200_000
        assert len(used) == len(sizes)


@simulated
async def test_left_over_uploads_never_bring_back_old_content(
    clock: SimulatedClock, expect_log: ExpectedLogs
) -> None:
    """Chunks of an abandoned upload that change, become zero or return to the committed content are stored again."""
    expect_log("a cut was abandoned")
    store = MemoryStore(clock)
    group = make_group(clock, copies=CopyLimits(memory=0, spill=0))
    async with syncing(store.client(), clock, group=group) as it:
        for chunk in range(8):
            await it.write(chunk, b"committed")
        await it.syncer.sync_now()
        for chunk in range(8):
            await it.write(chunk, b"uploaded")
        # The upload succeeds, the room for copies runs out before the commit: made so by hand.
        store.inject(FaultKind.HOLD, Verb.PUT_IF, key="*/segments/*")
        async with asyncio.TaskGroup() as tasks:
            sync = tasks.create_task(it.syncer.sync_now())
            await store.wait_held()
            assert it.group.cut is not None
            it.syncer.hold("test")
            store.release_held()
            while it.syncer.status.phase is not SyncPhase.HELD:
                await asyncio.sleep(0.1)
            it.group.cut.overflow()
            await it.write(0, b"changed")
            await it.disk.zero(CHUNK, CHUNK)
            await it.write(2, b"\0")
            await it.write(3, b"committed")
            it.syncer.release_hold("test")
            assert await sync == 2
        assert it.syncer.status.abandoned_cuts == 1
        assert it.syncer.status.elided_chunks == 4
        assert len(it.head.segments) == 3
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_left_over_uploads_that_cannot_be_remembered_are_forgotten(
    clock: SimulatedClock, expect_log: ExpectedLogs
) -> None:
    """No room for their map ends neither the syncer nor anything else, and nothing of them is ever referred to."""
    expect_log("a cut was abandoned")
    store = MemoryStore(clock)
    group = make_group(clock, copies=CopyLimits(memory=0, spill=0))
    async with syncing(store.client(), clock, group=group) as it:
        await it.write(0, b"committed")
        await it.syncer.sync_now()
        await it.write(0, b"uploaded")
        pending = it.syncer._committer._pending
        carry_over, asked = pending.carry_over, []

        def full() -> None:
            asked.append(len(pending.segments))
            raise CapacityError("there is no room for the map")

        store.inject(FaultKind.HOLD, Verb.PUT_IF, key="*/segments/*")
        async with asyncio.TaskGroup() as tasks:
            sync = tasks.create_task(it.syncer.sync_now())
            await store.wait_held()
            assert it.group.cut is not None
            it.syncer.hold("test")
            store.release_held()
            while it.syncer.status.phase is not SyncPhase.HELD:
                await asyncio.sleep(0.1)
            it.group.cut.overflow()
            pending.carry_over = full  # type: ignore[method-assign]
            await it.write(0, b"changed")
            it.syncer.release_hold("test")
            while not asked:
                await asyncio.sleep(0.1)
            assert not pending.segments
            pending.carry_over = carry_over  # type: ignore[method-assign]
            assert await sync == 2
        assert asked == [1]
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_a_fenced_syncer_stops_the_guest(clock: SimulatedClock, expect_log: ExpectedLogs) -> None:
    """After a forced claim elsewhere the next commit ends the guest's I/O with a clear error."""
    expect_log("belongs to another writer")
    store = MemoryStore(clock)
    async with syncing(store.client("old"), clock, drain=False) as old:
        await old.write(1, b"old")
        await old.syncer.sync_now()
        group = make_group(clock)
        async with syncing(store.client("new"), clock, group=group, expectation=Expectation.force()) as new:
            await new.write(1, b"new")
            await new.syncer.sync_now()
            await old.write(1, b"lost")
            for call in (old.syncer.sync_now, old.syncer.wait_stored):
                with pytest.raises(FencedError):
                    await call()
            with pytest.raises(FencedError):
                await old.write(2, b"no")
            with pytest.raises(FencedError):
                await old.disk.read(0, 512)
            assert old.syncer.status.phase is SyncPhase.FENCED
            assert "belongs to another writer" in old.syncer.status.error
            assert await restored(store.client(), clock) == new.image()


@simulated
async def test_a_hold_keeps_commits_and_cuts_back(clock: SimulatedClock) -> None:
    """While held nothing is committed; the first cut afterwards holds everything."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        it.syncer.hold("evacuation")
        it.syncer.hold("evacuation")
        await it.write(1, b"one")
        async with asyncio.TaskGroup() as tasks:
            sync = tasks.create_task(it.syncer.sync_now())
            await asyncio.sleep(60)
            assert it.group.cut is None
            it.syncer.release_hold("evacuation")
            await asyncio.sleep(60)
            assert it.syncer.status.holds == ("evacuation",)
            assert it.syncer.status.phase is SyncPhase.HELD
            assert stored_head(store).generation == 0
            await it.write(2, b"two")
            it.syncer.release_hold("evacuation")
            assert await sync == 1
        assert await restored(store.client(), clock) == it.image()
        with pytest.raises(InvariantError):
            it.syncer.release_hold("evacuation")


@simulated
async def test_a_hold_stops_a_cut_before_its_commit(clock: SimulatedClock) -> None:
    """A cut that is uploading when the hold begins waits with its commit."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        store.inject(FaultKind.HOLD, Verb.PUT_IF, key="*/segments/*")
        await it.write(1, b"one")
        async with asyncio.TaskGroup() as tasks:
            sync = tasks.create_task(it.syncer.sync_now())
            await store.wait_held()
            it.syncer.hold("handover")
            store.release_held()
            await asyncio.sleep(60)
            assert it.syncer.status.phase is SyncPhase.HELD
            assert it.register.outstanding is None
            assert len(it.group.unsynced()["disk"]) == 1
            it.syncer.release_hold("handover")
            assert await sync == 1


@simulated
async def test_a_group_that_was_taken_back_uploads_its_cut_again(
    clock: SimulatedClock, expect_log: ExpectedLogs
) -> None:
    """What an earlier epoch uploaded and did not commit is never referred to."""
    expect_log("the epoch .* changed")
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        store.inject(FaultKind.HOLD, Verb.PUT_IF, key="*/segments/*")
        await it.write(1, b"one")
        async with asyncio.TaskGroup() as tasks:
            sync = tasks.create_task(it.syncer.sync_now())
            await store.wait_held()
            it.syncer.hold("handover")
            store.release_held()
            await asyncio.sleep(1)
            assert it.register.owner is not None
            await it.register.claim(Expectation.opening(it.register.owner))
            it.syncer.release_hold("handover")
            assert await sync == 1
        assert [segment.key.split("/")[3].split("-")[0] for segment in it.head.segments] == ["0000000002"]
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_a_restart_with_the_disk_stores_only_what_was_dirty(clock: SimulatedClock) -> None:
    """The same host claims its own head again, and what was in an undecided cut is dirty."""
    store = MemoryStore(clock)
    group = make_group(clock)
    async with syncing(store.client(), clock, group=group, drain=False) as it:
        for chunk in range(32):
            await it.write(chunk, clock.token(CHUNK))
        await it.syncer.sync_now()
        await it.write(7, b"dirty")
        owner = it.register.owner
    assert owner is not None
    assert stored_head(store).state is WriterState.OPEN
    with pytest.raises(FencedError):
        async with syncing(store.client(), clock, group=make_group(clock)):
            pytest.fail("a host without the record opened the group")
    async with syncing(store.client(), clock, group=group, expectation=Expectation.opening(owner)) as it:
        assert (it.head.epoch, it.head.generation) == (2, 1)
        assert await it.syncer.sync_now() == 2
        assert it.syncer.status.sent_bytes < 2 * CHUNK
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_after_the_loss_of_the_host_the_last_cut_is_there(clock: SimulatedClock) -> None:
    """No disk, no record: a forced claim, and exactly the newest committed generation."""
    store = MemoryStore(clock)
    async with syncing(store.client("dead"), clock, drain=False) as it:
        await it.write(1, b"stored")
        await it.syncer.sync_now()
        image = it.image()
        await it.write(1, b"lost")
        await it.write(2, b"lost")
    assert await restored(store.client(), clock) == image


@simulated
async def test_checkpoints_keep_the_list_of_segments_short(clock: SimulatedClock) -> None:
    """Hundreds of commits: the head stays small, opening stays cheap, nothing is lost."""
    store = MemoryStore(clock)
    group = make_group(clock, {"disk": 3000 * CHUNK})
    settings = attrs.evolve(SETTINGS, checkpoint_segments=4)
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        longest = 0
        for number in range(60):
            await it.write(clock.random.randrange(3000), clock.token(64))
            if number % 7 == 0:
                await it.disk.zero(clock.random.randrange(2000) * CHUNK, 300 * CHUNK)
            await it.syncer.sync_now()
            longest = max(longest, len(it.head.segments))
            if number % 20 == 19:
                assert await restored(store.client(), clock) == it.image()
        assert 4 <= longest <= 17
        assert it.head.root is not None
        image = it.image()
    assert await restored(store.client(), clock) == image
    group = make_group(clock, {"disk": 3000 * CHUNK})
    mark_all_dirty(group)  # this disk is empty: the next cut says so
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        await it.syncer.sync_now()
    assert await restored(store.client(), clock) == it.image() == {"disk": bytes(3000 * CHUNK)}


@simulated
async def test_a_huge_first_cut_is_followed_by_a_checkpoint(clock: SimulatedClock) -> None:
    """Many segments in one commit are folded into a root at the next opportunity, although nothing is dirty."""
    store = MemoryStore(clock)
    group = make_group(clock, {"disk": 1100 * CHUNK})
    settings = attrs.evolve(SETTINGS, checkpoint_segments=1)
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        for chunk in range(1100):
            await it.write(chunk, clock.token(CHUNK))
        assert await it.syncer.sync_now() == 1
        assert len(it.head.segments) == 6
        await it.syncer.sync_now()
        assert (it.head.generation, it.head.segments) == (2, ())  # other objects, so another generation
        assert await restored(store.client(), clock) == it.image()
        requests = len(store.log)
        await it.syncer.sync_now()
        assert len(store.log) == requests


@simulated
async def test_a_damaged_page_does_not_stop_commits(clock: SimulatedClock) -> None:
    """The old map cannot be checkpointed, which is visible; new writes are stored all the same."""
    store = MemoryStore(clock)
    group = make_group(clock)
    settings = attrs.evolve(SETTINGS, checkpoint_segments=1)
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        for number in range(8):
            await it.write(number, clock.token(64))
            await it.syncer.sync_now()
        assert it.head.root is not None
        await it.write(20, clock.token(64))
        await it.syncer.sync_now()
    (key,) = {segment.key for segment in it.head.segments}
    pages = [key for key, data in store.snapshot().items() if data.startswith(b"SILOMAP")]
    for damaged in pages:
        data = bytearray(store.snapshot()[damaged])
        data[100] ^= 1
        store.place(damaged, bytes(data))
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        for number in range(6):
            await it.write(number, clock.token(64))
            await it.syncer.sync_now()
        assert "digest" in it.syncer.status.error
        assert it.syncer.generation == stored_head(store).generation
    assert key


@simulated
async def test_closing_says_what_is_not_stored(clock: SimulatedClock) -> None:
    """With the store away closing gives up after its limit and names the exposed bytes."""
    store = MemoryStore(clock)
    with pytest.raises(UnavailableError, match=f"{3 * CHUNK} bytes"):
        async with syncing(store.client(), clock) as it:
            for chunk in range(3):
                await it.write(chunk, b"exposed")
            store.offline = True
    assert it.syncer.status.phase is SyncPhase.CLOSED
    with pytest.raises(ClosedError):
        await it.syncer.sync_now()


@simulated
async def test_a_head_changed_by_hand_stops_commits_and_not_the_guest(
    clock: SimulatedClock, expect_log: ExpectedLogs
) -> None:
    """A rolled back head is not overwritten; the guest goes on, exposed, and the status says so."""
    expect_log("a cut was abandoned: the head")
    store = MemoryStore(clock)
    async with syncing(store.client(), clock, drain=False) as it:
        await it.write(1, b"one")
        await it.syncer.sync_now()
        old = it.head
        await it.write(1, b"two")
        await it.syncer.sync_now()
        store.place("vm1/head", encode_head(old))
        await it.write(1, b"three")
        await asyncio.sleep(60)
        assert stored_head(store) == old
        assert "generation 1" in it.syncer.status.error
        assert it.syncer.status.exposed_bytes == CHUNK
        await it.write(2, b"goes on")


@simulated
async def test_waiting_for_storage_does_not_hurry(clock: SimulatedClock) -> None:
    """`wait_stored` returns with the regular cut, at once when nothing is dirty."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        await it.syncer.sync_now()
        before = clock.monotonic()
        assert await it.syncer.wait_stored() == 0
        assert clock.monotonic() == before
        await it.write(1, b"one")
        assert await it.syncer.wait_stored() == 1
        assert clock.monotonic() - before > SETTINGS.rpo_s / 2


@simulated
async def test_volumes_are_checked_and_may_be_added(clock: SimulatedClock) -> None:
    """Another size is refused; a volume that the store does not know joins with the next commit."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock, group=make_group(clock, {"a": 4 * CHUNK})) as it:
        await it.write(0, b"a")
    for sizes in ({"a": 5 * CHUNK}, {"b": 4 * CHUNK}):
        with pytest.raises(InvalidRequestError):
            async with syncing(store.client(), clock, group=make_group(clock, sizes)):
                pytest.fail("a volume of another shape was opened")
    group = make_group(clock, {"b": 8 * CHUNK, "a": 4 * CHUNK})
    await group.volumes["a"].write(0, b"a" * CHUNK)
    async with syncing(store.client(), clock, group=group) as it:
        await it.write(7, b"b", "b")
        await it.syncer.sync_now()
        assert await restored(store.client(), clock) == it.image()
        assert {volume.name for volume in stored_head(store).volumes} == {"a", "b"}


@simulated
async def test_a_claim_serves_one_syncer(clock: SimulatedClock) -> None:
    """A second one would use the keys of the first again."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        await it.write(1, b"one")
        await it.syncer.sync_now()
        with pytest.raises(InvariantError, match="claim of its own"):
            await Syncer.open(it.group, it.register, store.client(), clock)


@simulated
async def test_the_rate_is_limited(clock: SimulatedClock) -> None:
    """Uploads stay within the limit, over a few seconds."""
    store = MemoryStore(clock)
    settings = attrs.evolve(SETTINGS, rate_bps=1 << 18, drain_timeout_s=600.0)
    group = make_group(clock, {"disk": 640 * CHUNK})
    async with syncing(store.client(), clock, group=group, settings=settings) as it:
        for chunk in range(640):
            await it.write(chunk, clock.token(CHUNK))
        before = clock.monotonic()
        await it.syncer.sync_now()
        assert 4 < clock.monotonic() - before < 12


@simulated
async def test_a_disk_error_abandons_the_cut(clock: SimulatedClock, expect_log: ExpectedLogs) -> None:
    """A chunk that cannot be read now is not dropped; it is stored when it can be."""
    expect_log("a cut was abandoned: .*medium")
    store = MemoryStore(clock)

    class Failing(MemoryDevice):
        broken = False

        def read_nowait(self, offset: int, length: int):
            if self.broken:
                raise UnavailableError("the medium has an error")
            return super().read_nowait(offset, length)

    group = make_group(clock, {"disk": 8 * CHUNK})
    device = Failing(8 * CHUNK)
    bad = group.add("bad", device, Geometry(8 * CHUNK, chunk_size=CHUNK))
    async with syncing(store.client(), clock, group=group) as it:
        await it.write(1, b"good")
        await it.write(1, b"bad", "bad")
        device.broken = True
        await asyncio.sleep(30)
        assert it.syncer.status.abandoned_cuts > 0
        assert "medium" in it.syncer.status.error
        device.broken = False
        await it.syncer.sync_now()
        assert await restored(store.client(), clock) == it.image()
    assert bad.chunks.residency(1) is Residency.PRESENT


@simulated
async def test_a_full_temporary_directory_abandons_the_cut(
    clock: SimulatedClock, expect_log: ExpectedLogs
) -> None:
    """No room for the map is an error that is seen before anything was committed."""
    expect_log("a cut was abandoned: .*no room for the map")
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        volume = it.syncer.manifest.volume("disk")
        reserve = volume.reserve

        def full(chunks) -> None:
            raise CapacityError("there is no room for the map")

        volume.reserve = full  # type: ignore[method-assign]
        await it.write(1, b"one")
        await asyncio.sleep(20)
        assert stored_head(store).generation == 0
        volume.reserve = reserve  # type: ignore[method-assign]
        assert await it.syncer.sync_now() == 1
        assert await restored(store.client(), clock) == it.image()


@simulated
async def test_an_amendment_rides_with_the_next_commit(clock: SimulatedClock) -> None:
    """It costs no request of its own; asked for, it is committed alone, and is no new generation."""
    store = MemoryStore(clock)
    async with syncing(store.client(), clock) as it:
        it.syncer.amendments.gc_floor = 1
        await it.write(1, b"a")
        assert await it.syncer.sync_now() == 1
        assert it.head.gc_floor == 1
        requests = len(store.log)
        await it.syncer.sync_now()
        assert len(store.log) == requests
        it.syncer.amendments.hot = PartRef(it.head.segments[0].key, 16, 10, "0" * 64)
        assert await it.syncer.sync_now() == 1
        assert it.head.hot is not None
        assert len(store.log) == requests + 1
        it.syncer.amendments.wants_checkpoint = True
        assert await it.syncer.sync_now() == 2
        assert (it.head.segments, it.head.root is not None) == ((), True)
        await it.syncer.sync_now()
        assert len(store.log) == requests + 3
