"""The bill: counted requests, stored bytes, a table of prices."""

from __future__ import annotations

import pytest

from silo.errors import InvalidRequestError
from silo.sync.cost import MONTH_S, PriceTable, Usage, monthly_cost
from silo.sync.counted_store import CountedStore
from silo.sync.memory_store import MemoryStore
from silo.testing.check_store import check_store
from silo.testing.loop import SimulatedClock
from tests.support.simulated import simulated

PRICES = PriceTable(currency="EUR", storage_gb_month=0.02, put_1000=0.005, get_1000=0.0004, out_gb=0.09)


def test_a_month_at_this_rate() -> None:
    """Two PUTs every five seconds cost more than a hundred GB."""
    usage = Usage(elapsed_s=50, puts=20, gets=10, out_bytes=1000, stored_bytes=100 * 1000**3)
    cost = monthly_cost(usage, PRICES)
    assert cost.puts == pytest.approx(20 * MONTH_S / 50)
    assert cost.put_cost == pytest.approx(5.184)
    assert cost.get_cost == pytest.approx(0.20736)
    assert cost.storage_cost == pytest.approx(2.0)
    assert cost.out_cost == pytest.approx(1000 * MONTH_S / 50 / 1e9 * 0.09)
    assert cost.total == pytest.approx(cost.put_cost + cost.get_cost + cost.storage_cost + cost.out_cost)
    assert cost.currency == "EUR"


def test_nothing_was_counted_yet() -> None:
    """No rate can be said."""
    with pytest.raises(InvalidRequestError):
        monthly_cost(Usage(elapsed_s=0), PRICES)


@simulated
async def test_a_counted_store_is_a_store(clock: SimulatedClock) -> None:
    """It keeps the contract, and counts each request once."""
    memory = MemoryStore(clock)
    store = CountedStore(memory.client())
    await store.put("a/b", [b"1234"])
    assert await store.put_if("a/c", [b"1"], match=None) is not None
    assert await store.get("a/b", start=1, length=2) is not None
    await store.head("a/b")
    assert [info.key async for info in store.list("a/")] == ["a/b", "a/c"]
    assert [info.key async for info in store.list("x/")] == []
    await store.delete(["a/b", "a/c"])
    assert store.requests == {"put": 2, "get": 1, "head": 1, "list": 2, "delete": 1}
    assert store.out_bytes == 2

    async def another() -> CountedStore:
        return CountedStore(memory.client())

    await check_store(another, many=5, big=1 << 16)
