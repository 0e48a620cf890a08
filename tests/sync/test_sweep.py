"""Fail the n-th call of the store, for every n, in a life with cuts, checkpoints, a point, a fork and collection.

Whatever fails, everybody gets there in the end, and what is needed is there all the while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import attrs
import pytest

from silo.errors import UnavailableError
from silo.sync.fork import fork_group
from silo.sync.head import Head, Keeping
from silo.sync.layout import point_key
from silo.sync.memory_store import MemoryStore
from silo.sync.reader import StoreReader
from silo.sync.store_faults import FaultKind
from silo.testing.loop import SimulatedClock, run_simulated
from tests.support.logs import ExpectedLogs
from tests.support.sync import CHUNK, FETCH, make_group, restored, syncing
from tests.sync.test_caretaker import TIDY, caretaker_of, keeper_of

T = TypeVar("T")
SETTINGS = attrs.evolve(TIDY, checkpoint_segments=1)
SIZES = {"disk": 16 * CHUNK, "data": 4 * CHUNK}


async def insist(call: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
    """As whoever calls would: once more when the store did not answer."""
    for _ in range(2):
        with contextlib.suppress(UnavailableError):
            return await call(*args, **options)
    return await call(*args, **options)


async def life(store: MemoryStore, clock: SimulatedClock) -> None:
    """Two owners, one after the other, with everything that goes on beside them."""
    keeper = keeper_of(store.client("operator"), clock)
    reader = StoreReader(store.client("forker"), clock, FETCH)
    images: dict[str, dict[str, bytes]] = {}
    point: Head
    for owner in range(2):
        group = make_group(clock, SIZES)
        async with syncing(store.client(), clock, group=group, settings=SETTINGS) as it:
            caretaker = caretaker_of(it, clock)
            for round_ in range(3):
                await it.disk.write(0, clock.token(12 * CHUNK))
                await it.write(round_, clock.token(64), "data")
                await it.disk.zero((12 + round_) * CHUNK, CHUNK)
                await it.syncer.sync_now()
                if round_ == 0 and owner == 0:
                    point = (await insist(keeper.keep_newest, "vm1", Keeping.POINT)).head
                    images["point"] = it.image()
                if round_ == 1 and owner == 0:
                    await insist(fork_group, store.client("forker"), reader, clock, "vm1", "ci")
                    images["fork"] = it.image()
                await insist(caretaker.collect, hurry=True)
            assert await insist(restored, store.client("reader"), clock) == it.image()
            assert await restored(store.client("reader"), clock, body=point) == images["point"]
            assert await restored(store.client("reader"), clock, "ci") == images["fork"]
            if owner == 1:
                await insist(keeper.withdraw, point_key("vm1", point.generation))
                await insist(caretaker.collect, hurry=True)
                assert caretaker.totals.deleted_objects > 0
            images["newest"] = it.image()
        assert await insist(restored, store.client("reader"), clock) == images["newest"]
    assert await restored(store.client("reader"), clock, "ci") == images["fork"]


def run(kind: FaultKind | None, skip: int) -> tuple[int, int]:
    """Calls that were made, and faults that struck."""

    async def scenario(clock: SimulatedClock) -> tuple[int, int]:
        store = MemoryStore(clock)
        rule = store.inject(kind, skip=skip) if kind is not None else None
        await life(store, clock)
        return len(store.log), rule.hits if rule is not None else 0

    return run_simulated(scenario, seed=1)


KINDS = (FaultKind.FAIL, FaultKind.LOSE_RESPONSE)


def sweep(kinds: Sequence[FaultKind], step: int, expect_log: ExpectedLogs) -> None:
    """Fail every ``step``-th call, one in each run."""
    calls, _ = run(None, 0)
    assert calls > 60
    for number in range(0, calls, step):
        for kind in kinds:
            assert run(kind, number)[1] == 1
    if expect_log.matching("a cut was abandoned"):
        expect_log("a cut was abandoned")


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_here_and_there_may_fail(kind: FaultKind, expect_log: ExpectedLogs) -> None:
    """And the next time it works."""
    sweep((kind,), 23, expect_log)


@pytest.mark.slow
def test_any_call_may_fail(expect_log: ExpectedLogs) -> None:
    """Each of them, in both ways: nothing done, and done without an answer."""
    sweep(KINDS, 1, expect_log)
