"""The store in memory keeps the contract, and misbehaves exactly as told."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from silo.clock import SystemClock
from silo.errors import ClosedError, InvalidRequestError, InvariantError, UnavailableError
from silo.sync.memory_client import MemoryClient
from silo.sync.memory_store import MemoryStore
from silo.sync.store_faults import Fault, FaultKind, Operation, Outcome, Verb
from silo.testing.check_store import check_store
from silo.testing.loop import SimulatedClock, run_simulated
from silo.testing.process import SimulatedProcess


@pytest.fixture
def store(clock: SystemClock) -> MemoryStore:
    return MemoryStore(clock)


def outcomes(store: MemoryStore) -> list[str]:
    return [operation.outcome.value for operation in store.log]


@pytest.mark.parametrize("latency_s", [0.0, 0.0005])
async def test_contract(clock: SystemClock, latency_s: float) -> None:
    store = MemoryStore(clock, latency_s=latency_s)

    async def make() -> MemoryClient:
        return store.client()

    await check_store(make)


@pytest.mark.parametrize("seed", range(5))
def test_contract_on_simulated_time(seed: int) -> None:
    async def scenario(clock: SimulatedClock) -> None:
        store = MemoryStore(clock, latency_s=3.0)

        async def make() -> MemoryClient:
            return store.client()

        await check_store(make, writers=4, rounds=3, big=100_000)

    run_simulated(scenario, seed=seed)


async def test_a_failure_changes_nothing(store: MemoryStore) -> None:
    client = store.client()
    for kind in (FaultKind.FAIL, FaultKind.SLOW_DOWN):
        store.inject(kind)
        with pytest.raises(UnavailableError):
            await client.put_if("a", [b"x"], match=None)
    assert store.snapshot() == {}
    assert outcomes(store) == ["failed", "failed"]
    assert await client.put_if("a", [b"x"], match=None) is not None


async def test_a_lost_response_changes_the_store(store: MemoryStore) -> None:
    client = store.client()
    store.inject(FaultKind.LOSE_RESPONSE, times=2)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await client.put_if("a", [b"x"], match=None)
    assert store.snapshot() == {"a": b"x"}
    assert outcomes(store) == ["lost", "refused"]


async def test_a_late_put_lands_when_told(store: MemoryStore) -> None:
    client = store.client()
    store.inject(FaultKind.LATE, Verb.PUT_IF)
    old = await client.put("a", [b"old"])
    with pytest.raises(UnavailableError):
        await client.put_if("a", [b"late"], match=old)
    assert store.snapshot() == {"a": b"old"}
    assert [operation.key for operation in store.land_late()] == ["a"]
    assert store.snapshot() == {"a": b"late"}
    assert store.land_late() == []
    assert outcomes(store) == ["done", "late"]


async def test_the_condition_of_a_late_put_is_looked_at_when_it_lands(store: MemoryStore) -> None:
    client = store.client()
    store.inject(FaultKind.LATE)
    with pytest.raises(UnavailableError):
        await client.put_if("a", [b"late"], match=None)
    await client.put_if("a", [b"faster"], match=None)
    store.land_late()
    assert store.snapshot() == {"a": b"faster"}
    assert outcomes(store) == ["late refused", "done"]


async def test_a_late_put_can_be_dropped(store: MemoryStore) -> None:
    store.inject(FaultKind.LATE, delay_s=1000)
    with pytest.raises(UnavailableError):
        await store.client().put("a", [b"late"])
    store.drop_late()
    assert store.land_late() == []
    assert store.snapshot() == {}


def test_delays_on_simulated_time() -> None:
    async def scenario(clock: SimulatedClock) -> None:
        store = MemoryStore(clock, latency_s=1.0, timeout_s=30.0)
        client = store.client()
        began = clock.monotonic()
        await client.put("a", [b"1"])
        assert clock.monotonic() - began == pytest.approx(1.0)

        store.inject(FaultKind.DELAY, delay_s=10.0)
        await client.put("a", [b"2"])
        assert clock.monotonic() - began == pytest.approx(12.0)

        store.inject(
            FaultKind.DELAY, delay_s=100.0
        )  # longer than the client waits: lands 70 s after it gave up
        with pytest.raises(UnavailableError):
            await client.put("a", [b"3"])
        assert clock.monotonic() - began == pytest.approx(42.5)
        await asyncio.sleep(69)
        assert store.snapshot() == {"a": b"2"}
        await asyncio.sleep(2)
        assert store.snapshot() == {"a": b"3"}

    run_simulated(scenario, seed=1)


async def test_held_operations_wait_for_the_test(store: MemoryStore) -> None:
    client = store.client()
    store.inject(FaultKind.HOLD, Verb.PUT, times=2)
    async with asyncio.TaskGroup() as group:
        group.create_task(client.put("a", [b"1"]))
        group.create_task(client.put("b", [b"2"]))
        await store.wait_held(2)
        assert sorted(operation.key for operation in store.held) == ["a", "b"]
        assert store.snapshot() == {}
        store.release_held()
    assert store.snapshot() == {"a": b"1", "b": b"2"}


async def test_corruption(store: MemoryStore) -> None:
    client = store.client()
    etag = await client.put("a", [b"0123"])
    store.inject(FaultKind.CORRUPT, Verb.GET)
    bad, good = await client.get("a"), await client.get("a")
    assert bad is not None
    assert good is not None
    assert (bytes(bad.data), bytes(good.data)) == (b"0133", b"0123")
    store.corrupt("a", 0)
    rotten = await client.get("a")
    assert rotten is not None
    assert (bytes(rotten.data), rotten.etag) == (b"1123", etag)
    store.inject(FaultKind.CORRUPT, Verb.PUT)
    await client.put("b", [b"0123"])
    assert store.snapshot()["b"] == b"0133"


async def test_offline(store: MemoryStore) -> None:
    near, far = store.client("near"), store.client("far")
    near.offline = True
    with pytest.raises(UnavailableError):
        await near.put("a", [b"x"])
    await far.put("a", [b"y"])
    near.offline, store.offline = False, True
    for client in (near, far):
        with pytest.raises(UnavailableError):
            await client.get("a")
    store.offline = False
    assert await near.get("a") is not None


async def test_an_answer_is_lost_when_the_link_goes_down_under_it(clock: SystemClock) -> None:
    store = MemoryStore(clock, latency_s=0.01)
    client = store.client()
    store.on_mutation.append(lambda _: setattr(client, "offline", True))
    with pytest.raises(UnavailableError):
        await client.put("a", [b"x"])
    assert store.snapshot() == {"a": b"x"}
    assert outcomes(store) == ["lost"]


async def test_killing_a_client_ends_what_was_under_way(clock: SystemClock) -> None:
    store = MemoryStore(clock, latency_s=3600.0)
    client = store.client()

    async def put() -> None:
        with pytest.raises(ClosedError):
            await client.put("a", [b"x"])

    async with asyncio.TaskGroup() as group:
        group.create_task(put())
        await asyncio.sleep(0)
        client.kill()
    assert outcomes(store) == ["abandoned"]
    assert store.land_late() == []
    with pytest.raises(ClosedError):
        await client.get("a")
    store.latency_s = 0.0
    assert await store.client().get("a") is None


async def test_what_a_dead_client_had_sent_may_land(clock: SystemClock) -> None:
    store = MemoryStore(clock)
    store.inject(FaultKind.HOLD, times=None)
    store.lands = lambda operation: 1000.0 if operation.key == "lands" else None
    client = store.client()

    async def put(key: str) -> None:
        with contextlib.suppress(ClosedError):
            await client.put(key, [b"x"])

    async with asyncio.TaskGroup() as group:
        group.create_task(put("lands"))
        group.create_task(put("never"))
        await store.wait_held(2)
        client.kill()
    store.land_late()
    assert store.snapshot() == {"lands": b"x"}


async def test_a_cancelled_put_may_land(store: MemoryStore) -> None:
    store.inject(FaultKind.HOLD)
    store.lands = lambda _: 1000.0
    client = store.client()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(client.put("a", [b"x"]))
        await store.wait_held()
        task.cancel()
    assert store.snapshot() == {}
    store.land_late()
    assert store.snapshot() == {"a": b"x"}


def test_a_put_outlives_the_simulated_process_that_sent_it() -> None:
    async def scenario(clock: SimulatedClock) -> None:
        store = MemoryStore(clock, latency_s=2.0)
        store.lands = lambda _: 5.0
        client = store.client()
        async with SimulatedProcess(client.put("a", [b"x"])) as process:
            await asyncio.sleep(0.5)
            client.kill()
            process.kill()
        assert store.snapshot() == {}
        await asyncio.sleep(5)
        assert store.snapshot() == {"a": b"x"}

    run_simulated(scenario, seed=3)


async def test_callbacks_see_the_store_after_each_mutation(store: MemoryStore) -> None:
    seen: list[tuple[str, dict[str, bytes]]] = []
    store.on_mutation.append(lambda operation: seen.append((operation.verb.value, store.snapshot())))
    client = store.client()
    etag = await client.put_if("a", [b"1"], match=None)
    assert await client.put_if("a", [b"2"], match=None) is None
    await client.put_if("a", [b"3"], match=etag)
    await client.delete(["a", "b"])
    await client.delete(["a"])
    assert seen == [("put_if", {"a": b"1"}), ("put_if", {"a": b"3"}), ("delete", {})]


async def test_chance_is_the_callers(store: MemoryStore) -> None:
    asked: list[int] = []

    def choose(operation: Operation) -> Fault | None:
        asked.append(operation.number)
        return Fault(FaultKind.FAIL) if operation.number == 1 else None

    store.choose = choose
    store.inject(FaultKind.FAIL, Verb.HEAD)
    client = store.client()
    await client.put("a", [b"x"])
    for call in (client.get("a"), client.head("a")):
        with pytest.raises(UnavailableError):
            await call
    assert asked == [0, 1]  # the rule decided about the last one


async def test_the_operators_hands(store: MemoryStore) -> None:
    client = store.client()
    await client.put("a", [b"x"])
    twin = store.clone()
    store.place("a", b"rolled back")
    store.place("b", b"y")
    store.remove("b")
    assert store.snapshot() == {"a": b"rolled back"}
    assert twin.snapshot() == {"a": b"x"}
    assert [operation.verb for operation in store.log] == [Verb.PUT]


async def test_a_buffer_that_changes_while_it_is_sent_is_a_bug(store: MemoryStore) -> None:
    body = bytearray(b"before")
    store.inject(FaultKind.HOLD)
    client = store.client()

    async def put() -> None:
        with pytest.raises(InvariantError):
            await client.put("a", [body])

    async with asyncio.TaskGroup() as group:
        group.create_task(put())
        await store.wait_held()
        body[:] = b"after!"
        store.release_held()


async def test_a_wrong_range_is_in_the_log(store: MemoryStore) -> None:
    client = store.client()
    await client.put("a", [b"x"])
    with pytest.raises(InvalidRequestError):
        await client.get("a", start=1)
    assert store.log[-1].outcome is Outcome.REFUSED
