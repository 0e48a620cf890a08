"""Leases: the arithmetic, every order of events around an intent, and two hosts whose clocks disagree."""

from __future__ import annotations

import asyncio
from itertools import permutations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import FencedError, InvalidRequestError, SiloError
from silo.sync.claim import Expectation, Owner, Seen, owner_of
from silo.sync.head import VolumeInfo, parse_head
from silo.sync.lease import DRIFT, MARGIN_S, Lease, LeaseState, check_lease, wait_s
from silo.sync.memory_store import MemoryStore
from silo.sync.register import Register
from silo.sync.settings import RetrySettings
from silo.sync.store_faults import Fault, FaultKind, Operation
from silo.testing.loop import SimulatedClock, explore
from tests.support.seeds import seeds
from tests.support.simulated import simulated

VOLUMES = (VolumeInfo("disk", 1 << 20, 65536, 512),)
SETTINGS = RetrySettings(delay_min_s=0.05, delay_max_s=1.0, request_timeout_s=5.0)
AFTER_LEASE = Expectation.restoring((), Seen(), after_lease=True)
T = 10.0


def test_a_lease_begins_with_the_request_and_not_with_its_answer() -> None:
    lease = Lease(T)
    assert lease.state(0.0) is LeaseState.STALLED
    confirmations = []
    lease.on_confirmed = lambda: confirmations.append(lease.valid_until)
    lease.confirmed(100.0)
    assert lease.state(109.9) is LeaseState.HOLDING
    assert lease.state(110.0) is LeaseState.STALLED
    lease.confirmed(90.0)  # the answer to an older request, which came later
    assert lease.valid_until == 110.0
    assert 100.0 < lease.renew_at < 105.0
    assert confirmations == [110.0, 110.0]


@pytest.mark.parametrize("lease_s", [0.0, -1.0, 0.5, 1e9, float("nan"), float("inf")])
def test_useless_leases(lease_s: float) -> None:
    with pytest.raises(InvalidRequestError):
        check_lease(lease_s)


@given(
    lease_s=st.floats(1, 3600),
    sent=st.floats(0, 1e6),
    ways=st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 100)),
    rate=st.floats(1 - DRIFT, 1),
    offset=st.floats(-1e9, 1e9),
)
def test_a_claimant_outwaits_every_confirmation(
    lease_s: float, sent: float, ways: tuple[float, float, float], rate: float, offset: float
) -> None:
    """Whenever the request was sent, however long everything takes, and though the writer's clock is slow."""
    lease = Lease(lease_s)

    def writers_clock(now: float) -> float:
        return offset + now * rate

    lease.confirmed(writers_clock(sent))
    applied = sent + ways[0]  # the request was in order before the intent
    intent_known = applied + ways[1] + ways[2]
    claimed = intent_known + wait_s(lease_s)
    assert lease.state(writers_clock(claimed)) is LeaseState.STALLED
    assert lease.state(writers_clock(claimed - MARGIN_S)) is LeaseState.STALLED or rate < 1


def register(store: MemoryStore, clock: SimulatedClock, name: str, lease_s: float | None = T) -> Register:
    return Register(store.client(name), "vm1", clock, SETTINGS, lease_s=lease_s)


def following(held: Register) -> object:
    assert held.head is not None
    return msgspec.structs.replace(held.head, generation=held.head.generation + 1)


def holds(held: Register, clock: SimulatedClock) -> bool:
    assert held.lease is not None
    return held.lease.state(clock.boottime()) is LeaseState.HOLDING


async def give_up(claimant: Register) -> None:
    """A claim whose owner lives."""
    with pytest.raises(FencedError, match="lives"):
        await claimant.claim(AFTER_LEASE)


@simulated
async def test_a_dead_owner_is_replaced_and_a_living_one_is_not(clock: SimulatedClock) -> None:
    """What decides is whether it takes the intent out of the head."""
    store = MemoryStore(clock)
    old, new = register(store, clock, "old"), register(store, clock, "new")
    await old.claim(Expectation.opening(), volumes=VOLUMES)
    began = clock.boottime()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(give_up(new))
        await asyncio.sleep(1)
        assert parse_head(store.snapshot()["vm1/head"], "vm1").intent is not None
        await old.renew()
        assert parse_head(store.snapshot()["vm1/head"], "vm1").intent is None
    await old.commit(following(old))
    assert holds(old, clock)
    head = await new.claim(AFTER_LEASE)
    assert clock.boottime() - began >= 2 * wait_s(T)
    assert owner_of(head) == Owner(2, new.incarnation)
    assert (head.generation, head.intent, head.lease_s) == (1, None, T)
    assert not holds(old, clock)
    with pytest.raises(FencedError):
        await old.renew()


@simulated
async def test_an_owner_without_a_lease_is_not_waited_for(clock: SimulatedClock) -> None:
    """It may be serving for ever."""
    store = MemoryStore(clock)
    old, new = register(store, clock, "old", None), register(store, clock, "new")
    await old.claim(Expectation.opening(), volumes=VOLUMES)
    with pytest.raises(FencedError, match="without a lease"):
        await new.claim(AFTER_LEASE)


@simulated
async def test_reading_an_intent_prolongs_nothing(clock: SimulatedClock) -> None:
    """Only the head without it does."""
    store = MemoryStore(clock)
    old, new = register(store, clock, "old"), register(store, clock, "new")
    await old.claim(Expectation.opening(), volumes=VOLUMES)
    async with asyncio.TaskGroup() as tasks:
        claiming = tasks.create_task(new.claim(AFTER_LEASE))
        await asyncio.sleep(5)
        until = old.lease.valid_until
        await old.confirm()
        assert old.lease.valid_until == until
        head = await claiming
    assert head.epoch == 2


COMMIT, RENEW, INTENT = "commit", "renew", "intent"


@pytest.mark.parametrize("order", sorted(set(permutations((COMMIT, COMMIT, RENEW, INTENT, INTENT)))))
@pytest.mark.parametrize("lost", [False, True])
def test_commits_and_renewals_go_over_intents(order: tuple[str, ...], lost: bool, expect_log) -> None:
    """In every order, with every answer lost once; no commit is lost, none is made twice, nobody is fenced."""

    async def scenario(clock: SimulatedClock) -> None:
        store = MemoryStore(clock)
        old = register(store, clock, "old")
        await old.claim(Expectation.opening(), volumes=VOLUMES)
        async with asyncio.TaskGroup() as tasks:
            for step in order:
                if lost:
                    store.inject(FaultKind.LOSE_RESPONSE, client="old")
                if step == COMMIT:
                    await old.commit(following(old))
                elif step == RENEW:
                    await renew(old)
                else:
                    tasks.create_task(give_up(register(store, clock, "new")))
                    await asyncio.sleep(0.5)
            await renew(old)
        found = parse_head(store.snapshot()["vm1/head"], "vm1")
        assert (found.epoch, found.generation, found.intent) == (1, 2, None)
        assert holds(old, clock) or clock.boottime() > old.lease.valid_until

    simulated(scenario)(expect_log)


async def renew(held: Register) -> None:
    """As the keeper does: again when the store does not answer."""
    while True:
        try:
            await held.renew()
        except FencedError:
            raise
        except SiloError:
            await asyncio.sleep(0.1)
        else:
            return


class SlowClock(SimulatedClock):
    """Runs slower than the world by a little less than what is allowed."""

    rate = 1 - DRIFT / 2

    def boottime(self) -> float:
        return super().boottime() * self.rate


async def take_over(clock: SimulatedClock) -> tuple[int, int]:
    """A writer that comes and goes, a store that fails, claimants that try. Returns claims won, and given up."""
    store = MemoryStore(clock, latency_s=0.01, timeout_s=2.0)
    trouble = clock.random.choice((0.0, 0.2, 0.5))
    kinds = (FaultKind.FAIL, FaultKind.LOSE_RESPONSE, FaultKind.LATE, FaultKind.DELAY)
    store.choose = lambda operation: (
        Fault(clock.random.choice(kinds), delay_s=clock.random.uniform(0, 3))
        if clock.random.random() < trouble
        else None
    )
    store.lands = lambda operation: clock.random.uniform(0, 3)
    slow = SlowClock(clock.loop)
    old = register(store, slow, "old")
    await old.claim(Expectation.opening(), volumes=VOLUMES)

    def look(operation: Operation) -> None:
        if parse_head(store.snapshot()["vm1/head"], "vm1").epoch > 1:
            assert not holds(old, slow), "two hosts serve at once"

    store.on_mutation.append(look)
    won = given_up = 0

    async def write() -> None:
        while True:
            await asyncio.sleep(clock.random.choice((0.1, 1, 4, 15)))
            try:
                async with asyncio.timeout(clock.random.choice((0.5, 5))):
                    if clock.random.random() < 0.5 or old.outstanding:
                        await old.renew()
                    else:
                        await old.commit(following(old))
            except FencedError:
                return
            except (SiloError, TimeoutError):
                continue

    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(write())
        while not won:
            await asyncio.sleep(clock.random.uniform(0, 20))
            if given_up > 3:
                writing.cancel()  # it dies at last
            try:
                head = await register(store, clock, f"new-{given_up}").claim(AFTER_LEASE)
            except FencedError:
                given_up += 1
            else:
                assert head.epoch == 2
                won += 1
        writing.cancel()
    assert not holds(old, slow)
    return won, given_up


@pytest.mark.sim
def test_never_two_at_once() -> None:
    """Whatever the store does to whose request: when a claim is in the head, the lease of the one before has ended."""
    outcomes = explore(take_over, seeds=seeds(60))
    assert sum(won for won, _ in outcomes) == len(outcomes)
    assert sum(given_up for _, given_up in outcomes) > 0
