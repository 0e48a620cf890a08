"""A target that takes long over the handover, and one that takes too long.

The guest stands still between the handover and the answer. A target that says that it is at work is waited for; one
that says nothing, or that cannot claim, loses the group again, and only the register decides that.
"""

from __future__ import annotations

import asyncio

import pytest

from silo.errors import MigrationAborted
from silo.events import HandoverDoubt, Phase, PhaseEntered
from silo.p2p.handover import SourceState
from silo.p2p.source import SourceMigration
from tests.support.migration import QUICK
from tests.support.scene import Scene, simulate


async def _answer_after(here: Scene, source: SourceMigration, delay_s: float) -> None:
    """While the source waits, every request to the store takes so long."""
    if source.state is SourceState.OFFERED:
        await asyncio.sleep(delay_s)


def _doubts(here: Scene) -> list[object]:
    return [event for event in here.a.events if isinstance(event, HandoverDoubt)]


@pytest.mark.parametrize("delay_s", [QUICK.answer_timeout_s + 1, QUICK.claim_timeout_s - 1])
def test_a_slow_store_does_not_end_a_migration(delay_s):
    """A claim takes several round trips, and a store may take longer for one than a silent target is given."""

    async def play(here: Scene) -> None:
        source = here.source()
        here.store.trouble = lambda: _answer_after(here, source, delay_s)
        await source.run()
        await here.check_moved()
        assert not _doubts(here)

    assert simulate(play)


def test_a_target_that_cannot_claim_loses_the_group():
    """It says that it is at work, but not for ever; then the register is asked, and the guest runs on at its source."""

    async def play(here: Scene) -> None:
        source = here.source()
        here.store.trouble = lambda: _answer_after(here, source, 1000.0)
        with pytest.raises(MigrationAborted, match="could not claim"):
            await source.run()
        assert _doubts(here)
        here.store.trouble = None
        await here.check_stayed()

    assert simulate(play)


def test_a_slow_workload_does_not_end_a_migration():
    """Once the claim is won there is nothing to ask the register for, however long the guest takes to start."""

    async def play(here: Scene) -> None:
        source = here.source()
        waited: list[SourceState] = []

        async def slow() -> None:
            here.b.hooks.delay_s = QUICK.claim_timeout_s  # for each of two hooks
            await asyncio.sleep(0)

        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(source.run())
            await here.until(lambda: here.target is not None)
            here.store.trouble = slow
            await here.target.wait_running()
            waited.append(source.state)
            await running
        assert waited == [SourceState.OFFERED]
        here.b.hooks.delay_s = 0.0
        await here.check_moved()
        assert not _doubts(here)

    assert simulate(play)


def test_a_target_that_says_nothing_is_given_less():
    """A link that is down tells nothing; whether the target has claimed is the register's to say."""

    async def play(here: Scene) -> None:
        source = here.source()

        async def vanish() -> None:
            if source.state is SourceState.OFFERED:
                here.network.partition("a", "b")
                await asyncio.sleep(QUICK.claim_timeout_s)

        here.store.trouble = vanish
        begun = here.world.clock.monotonic()
        with pytest.raises(MigrationAborted, match="did not answer"):
            await source.run()
        at = {e.phase: e.at for e in here.a.events if isinstance(e, PhaseEntered)}
        assert at[Phase.IN_DOUBT] - at[Phase.SWITCHOVER] < QUICK.claim_timeout_s
        assert at[Phase.IN_DOUBT] > begun
        here.store.trouble = None
        here.network.heal("a", "b")
        await here.check_stayed()

    assert simulate(play)
