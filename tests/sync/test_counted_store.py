"""The bill, verb by verb."""

from __future__ import annotations

from collections import Counter

from silo.sync.counted_store import CountedStore
from silo.sync.memory_store import MemoryStore
from silo.testing.check_store import check_store
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated


@simulated
async def test_every_request_is_counted_and_nothing_else_changes(clock: SimulatedClock) -> None:
    """The layer is a store like any other, and has counted what the store below has seen."""
    store = MemoryStore(clock)
    made: list[CountedStore] = []

    async def make() -> CountedStore:
        made.append(CountedStore(store.client()))
        return made[-1]

    await check_store(make, writers=4, rounds=2, big=100_000)
    counted: Counter[str] = sum((one.requests for one in made), Counter())
    seen = Counter(operation.verb.value.removesuffix("_if") for operation in store.log)
    assert set(seen) == {"put", "get", "head", "delete", "list"}
    for verb, count in seen.items():
        # What the store below refuses without sending it, such as a wrong name, has been counted as well.
        assert counted[verb] >= count
