"""A group moves: what each side does, what the guest sees, and what is left, on the deterministic loop.

The guest verifies every read while it runs; what these tests look at is who runs it, what went over the link, what
the hooks were told, and that nothing is left behind.
"""

from __future__ import annotations

import asyncio

import attrs
import pytest

from silo.chunkmap import SYNC_DIRTY, Residency
from silo.errors import MigrationAborted
from silo.events import (
    LinkChanged,
    MigrationReport,
    Outcome,
    Phase,
    PhaseEntered,
    RoundStarted,
    StepFailed,
)
from silo.p2p.handover import SourceState, TargetState
from silo.p2p.source import SourceMigration
from tests.support.migration import CHUNK, QUICK, HostSide, Store
from tests.support.scene import Scene, outcome, simulate

with_and_without_store = pytest.mark.parametrize("with_store", [True, False])


# ---- the group moves ----------------------------------------------------------------------------------------


@with_and_without_store
@pytest.mark.parametrize("seed", range(5))
def test_a_group_moves_under_a_running_guest(with_store, seed):
    """Two volumes, a guest that never pauses for longer than the switchover, and not one wrong read."""

    async def play(here: Scene) -> None:
        report = await here.migrate()
        await here.check_moved()
        assert report.outcome is Outcome.RELEASED
        assert report.rounds >= 1  # rounds that were announced; the first plan is not one
        assert report.bytes_peer > 0
        assert report.downtime_ms is not None
        assert report.evacuated_ms is not None
        assert sum(phase.duration_s for phase in report.phases) == pytest.approx(report.duration_s)
        assert [phase.phase for phase in report.phases] == [
            Phase.CONNECTING, Phase.PRE_COPY, Phase.SWITCHOVER, Phase.POST_COPY, Phase.EVACUATED,
        ]  # fmt: skip
        assert isinstance(target := await here.target_outcome, MigrationReport)
        assert target.outcome is Outcome.TAKEN
        assert here.b.records.content == {}

    assert simulate(play, seed=seed, with_store=with_store)


@with_and_without_store
def test_hooks_come_in_their_order(with_store):
    """Quiesce, suspend, flush, capture, and fence when it is over; prepare, resume and unquiesce over there."""

    async def play(here: Scene) -> None:
        await here.migrate()
        await here.check_moved()
        assert here.a.hooks.calls == ["prepare", "quiesce", "suspend", "flush", "capture", "fence"]
        assert here.b.hooks.calls == ["prepare", "resume", "unquiesce"]

    assert simulate(play, with_store=with_store)


def test_the_workloads_own_time_is_told_apart():
    """Downtime does not include what the hooks took, on either side; the report has both."""

    async def play(here: Scene) -> None:
        here.a.hooks.delay_s = here.b.hooks.delay_s = 0.5
        report = await here.migrate()
        assert report.workload_ms == pytest.approx(
            3 * 500 + 2 * 500
        )  # suspend, flush, capture; resume, unquiesce
        assert report.downtime_ms < 100

    assert simulate(play)


def test_cold_chunks_that_the_store_has_are_not_sent():
    """Only what the store does not have goes over the link, and what is hot, up to the budget."""

    async def play(here: Scene) -> None:
        await here.guest.stop("a")
        here.guest.writes = 0.0
        await here.a.group.volumes["disk"].write(0, b"full" * (16 * CHUNK))
        here.guest.model["disk"][:] = b"full" * (16 * CHUNK)
        assert await here.a.link.sync()
        for volume in here.a.group.volumes.values():
            volume.heat.read_view[:] = 0
        await here.a.group.volumes["disk"].write(5 * CHUNK, b"new." * (CHUNK // 4))
        here.guest.model["disk"][5 * CHUNK : 6 * CHUNK] = b"new." * (CHUNK // 4)
        here.a.group.volumes["disk"].heat.read_view[20:30] = 100
        report = await here.migrate()
        await here.target.wait_evacuated()
        assert report.bytes_peer == CHUNK + 8 * CHUNK  # the dirty one, and the budget of hot ones
        disk = here.b.group.volumes["disk"]
        present = disk.chunks.select(7, Residency.PRESENT).tolist()
        assert {5, *range(20, 28)} <= set(present)
        assert disk.chunks.select_dirty(SYNC_DIRTY).tolist() == [5]

    assert simulate(play)


def test_the_first_commit_at_the_target_covers_everything_that_the_source_had_not_committed():
    """Commits are held until evacuated; then what was dirty at the source is dirty at the target, and is stored."""

    async def play(here: Scene) -> None:
        await here.a.link.sync()
        await asyncio.sleep(0.05)
        slow = attrs.evolve(QUICK, rate_bps=20 * CHUNK, rounds_max=1)
        here.a.site = attrs.evolve(here.a.site, settings=slow)
        migration = here.tasks.create_task(here.migrate())
        await here.until(lambda: here.target is not None and here.target.state is TargetState.RUNNING)
        assert here.b.link.holds
        assert not await here.b.link.sync()
        await migration
        await here.target.wait_evacuated()
        await here.guest.stop("b")
        assert here.store.generation == 1
        assert await here.b.link.sync()
        assert {n: bytes(c) for n, c in here.guest.model.items()} == here.store.images[2]

    assert simulate(play)


def test_commits_go_on_during_pre_copy():
    """Protection is not switched off while chunks move: the store gets new generations, and they count."""

    async def play(here: Scene) -> None:
        here.guest.pause_s = 0.01
        settings = attrs.evolve(QUICK, rate_bps=1.5 * 64 * CHUNK)
        here.a.site = attrs.evolve(here.a.site, settings=settings)
        migration = here.tasks.create_task(here.migrate())
        await asyncio.sleep(0.3)
        assert await here.a.link.sync()
        await migration
        await here.check_moved()
        assert here.store.generation == 1

    assert simulate(play, seed=3)


def test_a_sparse_disk_travels_as_a_few_bytes():
    """Zeros are said in sets; nothing is sent for them and nothing is left to look up."""

    async def play(here: Scene) -> None:
        await here.guest.stop("a")
        for name in here.guest.model:
            await here.a.group.volumes[name].zero(0, len(here.guest.model[name]))
            here.guest.model[name][:] = bytes(len(here.guest.model[name]))
        report = await here.migrate()
        assert report.bytes_peer == 0
        await here.target.wait_evacuated()
        assert here.b.group.absent_counts((Residency.ABSENT_PEER, Residency.ABSENT_STORE)) == 0

    assert simulate(play, with_store=False)


def test_heat_goes_along():
    """What was hot at the source is hot at the target."""

    async def play(here: Scene) -> None:
        await here.guest.stop("a")
        here.a.group.volumes["disk"].heat.read_view[7] = 1000
        await here.migrate()
        assert int(here.b.group.volumes["disk"].heat.read_heat().argmax()) == 7

    assert simulate(play)


def test_a_guest_that_writes_faster_than_the_link_moves_all_the_same():
    """When rounds do not shrink, the guest moves and the rest follows, demanded chunks first."""

    async def play(here: Scene) -> None:
        settings = attrs.evolve(QUICK, rate_bps=20 * CHUNK, rounds_max=3)
        here.a.site = attrs.evolve(here.a.site, settings=settings)
        report = await here.migrate()
        await here.check_moved()
        assert report.rounds <= 4
        post_copy = next(phase for phase in report.phases if phase.phase is Phase.POST_COPY)
        assert post_copy.duration_s > 0.2

    assert simulate(play, with_store=False)


def test_the_deadline_ends_pre_copy():
    """With little time left, the guest moves at once, so that only what nobody else has must still be carried."""

    async def play(here: Scene) -> None:
        settings = attrs.evolve(QUICK, rate_bps=40 * CHUNK, rounds_max=1000)
        here.a.site = attrs.evolve(here.a.site, settings=settings)
        started = here.world.clock.monotonic()
        report = await here.migrate(deadline=started + 7.0)
        await here.check_moved()
        assert report.evacuated_ms < 7000

    assert simulate(play, with_store=False)


def test_events_tell_the_story():
    """Phases in order, rounds, and the link, each with the group and the time."""

    async def play(here: Scene) -> None:
        await here.migrate()
        events = here.a.events
        phases = [event.phase for event in events if isinstance(event, PhaseEntered)]
        copying = [Phase.CONNECTING, Phase.PRE_COPY, Phase.SWITCHOVER]
        assert phases == [*copying, Phase.POST_COPY, Phase.EVACUATED, Phase.ENDED]
        rounds = [event.round for event in events if isinstance(event, RoundStarted)]
        assert rounds == list(range(1, len(rounds) + 1))
        assert [event.up for event in events if isinstance(event, LinkChanged)] == [True]
        assert {event.group for event in events} == {"vm1"}
        assert [event.at for event in events] == sorted(event.at for event in events)

    assert simulate(play)


# ---- the group stays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["prepare", "quiesce", "suspend", "flush", "capture"])
@with_and_without_store
def test_a_hook_that_fails_before_the_claim_ends_in_unsuspend(hook, with_store):
    """Whichever hook fails, the guest runs on at the source and the target forgets."""

    async def play(here: Scene) -> None:
        here.a.hooks.failing = {hook: 1}
        with pytest.raises(MigrationAborted, match=f"hook {hook} failed"):
            await here.migrate()
        await here.check_stayed()
        assert here.a.hooks.calls[-2:] == ["unsuspend", "unquiesce"] or hook == "prepare"
        if here.b.hooks.calls:  # what its preparation has started does not stay
            assert here.b.hooks.calls == ["prepare", "fence"]

    assert simulate(play, with_store=with_store)


def test_a_target_ends_what_its_preparation_has_started():
    """After an aborted attempt, with a few attempts of its own; and a failure to do so delays nobody."""

    async def play(here: Scene) -> None:
        here.a.hooks.failing = {"suspend": 1}
        here.b.hooks.failing = {"fence": 2}
        with pytest.raises(MigrationAborted):
            await here.migrate()
        await here.check_stayed()
        await here.until(lambda: here.b.hooks.calls == ["prepare", "fence", "fence", "fence"])
        assert [event.step for event in here.b.events if isinstance(event, StepFailed)] == ["fence"] * 2

    assert simulate(play)


def test_an_unsuspend_that_fails_is_tried_again():
    """A guest that stands still is not given up over one error, and observers are told."""

    async def play(here: Scene) -> None:
        here.a.hooks.failing = {"capture": 1, "unsuspend": 3}
        with pytest.raises(MigrationAborted):
            await here.migrate()
        await here.check_stayed()
        assert len([event for event in here.a.events if isinstance(event, StepFailed)]) == 3

    assert simulate(play)


def test_a_resume_that_fails_is_tried_again():
    """After the claim there is no way back: the target goes on trying, and the source learns the whole downtime."""

    async def play(here: Scene) -> None:
        here.b.hooks.failing = {"resume": 3}
        report = await here.migrate()
        await here.check_moved()
        assert report.downtime_ms > 300
        assert here.b.hooks.calls.count("resume") == 4

    assert simulate(play)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("phase", [Phase.PRE_COPY, Phase.SWITCHOVER])
def test_an_observer_may_object_before_the_claim(side, phase):
    """A veto on either side, before pre-copy or before the switchover, leaves the guest where it was."""

    async def play(here: Scene) -> None:
        host: HostSide = getattr(here, side)
        consent = host.consent

        async def object_to(event: PhaseEntered) -> None:
            await consent(event)
            if event.phase is phase:
                raise MigrationAborted("not today")

        host.consent = object_to  # type: ignore[method-assign]
        with pytest.raises(MigrationAborted, match="not today"):
            await here.migrate()
        await here.check_stayed()

    assert simulate(play)


def test_a_target_that_refuses():
    """The source hears why."""

    async def play(here: Scene) -> None:
        async def refuse() -> None:
            offer = await anext(here.reception.offers())
            assert offer.group == "vm1"
            assert [volume.name for volume in offer.volumes] == ["disk", "memory"]
            offer.refuse("no room for vm1")

        here.tasks.create_task(refuse())
        with pytest.raises(MigrationAborted, match="no room for vm1"):
            await here.migrate()
        await here.check_stayed()

    assert simulate(play, accept=False)


def test_a_target_that_never_decides():
    """The offer ends when the source's patience does."""

    async def play(here: Scene) -> None:
        with pytest.raises(MigrationAborted, match="has not accepted"):
            await here.migrate()
        await here.check_stayed()

    assert simulate(play, accept=False)


def test_nobody_answers():
    """A wrong address is an error at once, not after all patience."""

    async def play(here: Scene) -> None:
        started = here.world.clock.monotonic()
        with pytest.raises(MigrationAborted, match="nobody answers"):
            await SourceMigration(here.a.group, "tcp:c:1", here.a.site, here.a.plugs).run()
        assert here.world.clock.monotonic() - started < 1
        await here.check_stayed()

    assert simulate(play)


def test_two_hosts_with_different_registers():
    """Before a single chunk moves, both sides prove that they see one register."""

    async def play(here: Scene) -> None:
        here.b.link.store = Store()
        with pytest.raises(MigrationAborted, match="another store"):
            await here.migrate()
        await here.check_stayed()
        assert here.b.group.volumes["disk"].filled_bytes == 0

    assert simulate(play)


@pytest.mark.parametrize("without", ["a", "b"])
def test_one_host_with_a_store_and_one_without(without):
    """A store on one side only is refused, with a reason."""

    async def play(here: Scene) -> None:
        getattr(here, without).link = None
        with pytest.raises(MigrationAborted, match="in a store"):
            await here.migrate()
        await here.check_stayed()

    assert simulate(play)


def test_a_move_onwards_before_evacuation_is_refused():
    """A group has at most one peer source."""

    async def play(here: Scene) -> None:
        here.a.group.volumes["disk"].chunks.set_residency(0, Residency.ABSENT_PEER)
        with pytest.raises(MigrationAborted, match="still needs chunks"):
            await here.migrate()
        here.a.group.volumes["disk"].chunks.set_residency(0, Residency.PRESENT)
        await here.check_stayed()

    assert simulate(play)


@pytest.mark.parametrize("at", ["connecting", "pre-copy", "suspended"])
@pytest.mark.parametrize("how", ["abort", "cancel"])
@with_and_without_store
def test_stopping_a_migration_before_the_handover(at, how, with_store):
    """Whether it is aborted or cancelled, the guest runs on at the source, and a second attempt succeeds."""

    async def play(here: Scene) -> None:
        slow = attrs.evolve(QUICK, rate_bps=50 * CHUNK)
        here.a.site = attrs.evolve(here.a.site, settings=slow)
        here.a.hooks.delay_s = 0.2
        source = here.source()
        task = here.tasks.create_task(outcome(source.run()))
        await here.until(
            {
                "connecting": lambda: bool(here.a.events),
                "pre-copy": lambda: here.b.group.volumes["disk"].filled_bytes > 0,
                "suspended": lambda: "suspend" in here.a.hooks.calls,
            }[at]
        )
        if how == "abort":
            source.abort("changed our mind")
        else:
            task.cancel()
        await asyncio.wait((task,))
        assert source.state is SourceState.ABORTED
        await here.check_stayed()
        assert how == "cancel" or "changed our mind" in str(task.result())
        here.target_outcome.cancel()
        await asyncio.sleep(6)
        here.b.reopen(is_open=False)
        here.target_outcome = here.tasks.create_task(here.accept())
        await here.migrate()
        await here.check_moved()
        here.target_outcome.cancel()

    assert simulate(play, with_store=with_store)
