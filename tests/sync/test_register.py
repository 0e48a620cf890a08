"""The register over a store that loses answers, delays writes and goes away."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from silo.errors import CorruptionError, FencedError, InvalidRequestError, InvariantError, UnavailableError
from silo.sync.claim import Expectation, Owner
from silo.sync.head import Head, VolumeInfo, WriterState, encode_head, parse_head
from silo.sync.memory_store import MemoryStore
from silo.sync.register import Register
from silo.sync.settings import RetrySettings
from silo.sync.store_faults import Fault, FaultKind, Outcome, Verb
from silo.testing.loop import SimulatedClock, explore
from tests.support.seeds import seeds
from tests.support.simulated import simulated

VOLUMES = (VolumeInfo("disk", 1 << 20, 65536, 512),)
SETTINGS = RetrySettings(delay_min_s=0.1, delay_max_s=2.0, request_timeout_s=30.0)


def register(store: MemoryStore, name: str = "a") -> Register:
    return Register(store.client(name), "vm1", store.clock, SETTINGS)


def following(head: Head) -> Head:
    return msgspec.structs.replace(head, generation=head.generation + 1, seq=head.seq + 1)


def stored(store: MemoryStore) -> Head:
    return parse_head(store.snapshot()["vm1/head"], "vm1")


@simulated
async def test_a_group_is_created_committed_released_and_opened_again(clock: SimulatedClock) -> None:
    """The life of a group without any trouble costs one request per step."""
    store = MemoryStore(clock)
    first = register(store)
    head = await first.claim(Expectation.opening(), volumes=VOLUMES)
    assert (head.epoch, head.generation, head.volumes) == (1, 0, VOLUMES)
    assert first.owner == Owner(1, first.incarnation)
    head = await first.commit(following(head))
    assert stored(store) == head == first.head == await first.read()
    released = await first.release()
    assert released.state is WriterState.RELEASED
    assert await first.release() == released
    second = register(store, "b")
    head = await second.claim(Expectation.opening())
    assert (head.epoch, head.generation, head.state) == (2, 1, WriterState.OPEN)
    assert [operation.verb for operation in store.log] == [
        *(Verb.GET, Verb.PUT_IF),  # claim
        Verb.PUT_IF,  # commit
        Verb.GET,  # our own read
        Verb.PUT_IF,  # release
        *(Verb.GET, Verb.PUT_IF),  # claim
    ]


@simulated
async def test_bodies_are_never_equal(clock: SimulatedClock) -> None:
    """Committing the same thing twice writes two different objects."""
    store = MemoryStore(clock)
    owner = register(store)
    head = await owner.claim(Expectation.opening(), volumes=VOLUMES)
    bodies = {encode_head(head)}
    for _ in range(3):
        head = await owner.commit(head)
        bodies.add(encode_head(head))
    assert len(bodies) == 4


@simulated
async def test_a_lost_response_is_adopted(clock: SimulatedClock) -> None:
    """A commit and a claim that were applied without an answer are found and kept."""
    store = MemoryStore(clock)
    owner = register(store)
    store.inject(FaultKind.LOSE_RESPONSE, Verb.PUT_IF)
    head = await owner.claim(Expectation.opening(), volumes=VOLUMES)
    assert head == stored(store)
    store.inject(FaultKind.LOSE_RESPONSE, Verb.PUT_IF)
    head = await owner.commit(following(head))
    assert head == stored(store)
    assert head.generation == 1
    outcomes = [operation.outcome for operation in store.log if operation.verb is Verb.PUT_IF]
    assert outcomes == [Outcome.LOST, Outcome.LOST, Outcome.REFUSED]
    await owner.commit(following(head))


@simulated
async def test_a_late_put_does_no_harm(clock: SimulatedClock) -> None:
    """The first sending of a commit arrives after the second, and after the next generation."""
    store = MemoryStore(clock)
    owner = register(store)
    head = await owner.claim(Expectation.opening(), volumes=VOLUMES)
    store.inject(FaultKind.LATE, Verb.PUT_IF)
    head = await owner.commit(following(head))
    head = await owner.commit(following(head))
    (late,) = store.land_late()
    assert late.outcome is Outcome.LATE_REFUSED
    assert stored(store) == head
    assert head.generation == 2


@simulated
async def test_a_late_put_that_lands_first_is_adopted(clock: SimulatedClock) -> None:
    """Between two sendings of the same bytes the first one arrives after all."""
    store = MemoryStore(clock)
    owner = register(store)
    head = await owner.claim(Expectation.opening(), volumes=VOLUMES)
    store.inject(FaultKind.LATE, Verb.PUT_IF, delay_s=0.01)
    committed = await owner.commit(following(head))
    assert stored(store) == committed
    outcomes = [operation.outcome for operation in store.log if operation.verb is Verb.PUT_IF]
    assert outcomes == [Outcome.DONE, Outcome.LATE, Outcome.REFUSED]


@simulated
async def test_an_unreachable_store_is_waited_for_visibly(clock: SimulatedClock) -> None:
    """A commit goes on for as long as it takes, with the same bytes, and says why."""
    store = MemoryStore(clock)
    owner = register(store)
    head = await owner.claim(Expectation.opening(), volumes=VOLUMES)
    store.offline = True
    async with asyncio.TaskGroup() as tasks:
        commit = tasks.create_task(owner.commit(following(head)))
        await asyncio.sleep(600)
        assert not commit.done()
        assert owner.outstanding is not None
        assert owner.trouble is not None
        assert isinstance(owner.trouble.error, UnavailableError)
        assert 300 < owner.trouble.attempts < 2000  # every 1 to 2 seconds in the end
        store.offline = False
    assert commit.result() == stored(store)
    assert (owner.outstanding, owner.trouble) == (None, None)


@simulated
async def test_a_hanging_request_counts_as_unanswered(clock: SimulatedClock) -> None:
    """A request that is held for ever is given up after its limit and repeated."""
    store = MemoryStore(clock)
    owner = register(store)
    head = await owner.claim(Expectation.opening(), volumes=VOLUMES)
    store.inject(FaultKind.HOLD, Verb.PUT_IF)
    before = clock.monotonic()
    await owner.commit(following(head))
    assert clock.monotonic() - before >= SETTINGS.request_timeout_s


@simulated
async def test_a_cancelled_commit_stays_outstanding(clock: SimulatedClock) -> None:
    """Nothing else is tried before its outcome is known; settling finds it out."""
    for applied in (True, False):
        store = MemoryStore(clock)
        owner = register(store)
        head = await owner.claim(Expectation.opening(), volumes=VOLUMES)
        store.inject(FaultKind.LOSE_RESPONSE if applied else FaultKind.FAIL, Verb.PUT_IF)
        store.inject(FaultKind.FAIL, times=None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await owner.commit(following(head))
        assert owner.outstanding is not None
        with pytest.raises(InvariantError):
            await owner.commit(following(head))
        store.rules.clear()
        settled = await owner.settle()
        assert settled.generation == 1
        assert settled == stored(store)
        assert await owner.settle() == settled


@simulated
async def test_a_zombie_is_fenced_for_ever(clock: SimulatedClock) -> None:
    """After another claim the old owner's commits end with FencedError, its late ones with nothing."""
    store = MemoryStore(clock)
    old, new = register(store, "old"), register(store, "new")
    head = await old.claim(Expectation.opening(), volumes=VOLUMES)
    store.inject(FaultKind.LATE, Verb.PUT_IF, client="old", times=None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            await old.commit(following(head))
    store.rules.clear()
    claimed = await new.claim(Expectation.force(epoch_floor=head.epoch))
    assert {operation.outcome for operation in store.land_late()} == {Outcome.LATE_REFUSED}
    for _ in range(2):
        with pytest.raises(FencedError):
            await old.settle()
    with pytest.raises(FencedError):
        await old.commit(following(head))
    with pytest.raises(FencedError):
        await old.claim(Expectation.force())
    with pytest.raises(FencedError):
        await old.confirm()
    assert stored(store) == claimed
    assert await new.confirm() == claimed


@simulated
async def test_a_handover_claims_over_the_outstanding_commit(clock: SimulatedClock) -> None:
    """The source's last commit may land before the claim or never; the claim builds on what it finds."""
    for lands in (True, False):
        store = MemoryStore(clock)
        source, target = register(store, "source"), register(store, "target")
        head = await source.claim(Expectation.opening(), volumes=VOLUMES)
        store.inject(FaultKind.LATE, Verb.PUT_IF, client="source", times=1)
        store.inject(FaultKind.FAIL, client="source", times=None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await source.commit(following(head))
        if lands:
            store.land_late()
        assert source.owner is not None
        expectation = Expectation.handover(source.owner, (0, 1), "offer")
        claimed = await target.claim(expectation, nonce="offer")
        assert (claimed.epoch, claimed.generation) == (2, 1 if lands else 0)
        store.land_late()
        assert stored(store) == claimed
        store.rules.clear()
        if lands:
            # The nonce of the commit is gone from the head, so the source cannot know; it is fenced either way.
            assert claimed.seq == 0
        with pytest.raises(FencedError):
            await source.settle()


@simulated
async def test_a_target_that_restarts_claims_again(clock: SimulatedClock) -> None:
    """The same handover, another process: the nonce in the head says that the claim was won before."""
    store = MemoryStore(clock)
    source, target = register(store, "source"), register(store, "target")
    await source.claim(Expectation.opening(), volumes=VOLUMES)
    assert source.owner is not None
    expectation = Expectation.handover(source.owner, (0,), "offer")
    await target.claim(expectation, nonce="offer")
    restarted = register(store, "target")
    head = await restarted.claim(expectation, nonce="offer")
    assert (head.epoch, head.incarnation) == (3, restarted.incarnation)
    assert head.claim is not None
    assert head.claim.nonce == "offer"
    with pytest.raises(FencedError):
        await target.confirm()
    with pytest.raises(FencedError):
        await register(store).claim(Expectation.handover(source.owner, (0,), "another offer"))


@simulated
async def test_a_source_takes_its_group_back(clock: SimulatedClock) -> None:
    """Claiming again as the owner makes a new epoch, before which a late claim of the target loses."""
    store = MemoryStore(clock)
    source, target = register(store, "source"), register(store, "target")
    await source.claim(Expectation.opening(), volumes=VOLUMES)
    before = source.owner
    assert before is not None
    head = await source.claim(Expectation.opening(before))
    assert source.owner == Owner(2, source.incarnation)
    await source.commit(following(head))
    with pytest.raises(FencedError):
        await target.claim(Expectation.handover(before, (0,), "offer"))


@simulated
async def test_what_must_be_durable_is_so_before_the_claim(clock: SimulatedClock) -> None:
    """`prepare` sees every owner that may turn out to have won, and its failure prevents the claim."""
    store = MemoryStore(clock)
    seen: list[tuple[Owner, str]] = []

    async def prepare(owner: Owner, nonce: str) -> None:
        assert "vm1/head" not in store.snapshot() or stored(store).epoch < owner.epoch
        seen.append((owner, nonce))

    owner = register(store)
    store.inject(FaultKind.FAIL, Verb.PUT_IF, times=2)
    head = await owner.claim(Expectation.opening(), volumes=VOLUMES, nonce="n1", prepare=prepare)
    assert seen == [(Owner(1, owner.incarnation), "n1")]
    assert head.claim is not None
    assert head.claim.nonce == "n1"

    async def fail(owner: Owner, nonce: str) -> None:
        raise UnavailableError("the disk is away")

    refused = register(store, "b")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10):
            await refused.claim(Expectation.force(), prepare=fail)
    assert stored(store) == head


@simulated
async def test_a_cancelled_claim_is_found_again(clock: SimulatedClock) -> None:
    """The caller's deadline passes while the outcome is unknown; asking again gives the answer."""
    for applied in (True, False):
        store = MemoryStore(clock)
        owner = register(store)
        store.inject(FaultKind.LOSE_RESPONSE if applied else FaultKind.FAIL, Verb.PUT_IF)
        store.inject(FaultKind.FAIL, Verb.GET, skip=1, times=None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await owner.claim(Expectation.opening(), volumes=VOLUMES)
        assert owner.owner is None
        store.rules.clear()
        head = await owner.claim(Expectation.opening(), volumes=VOLUMES)
        assert (head.epoch, head.incarnation) == (1, owner.incarnation)


@simulated
async def test_a_head_changed_by_hand_is_not_overwritten(clock: SimulatedClock) -> None:
    """Rolled back, removed or damaged: the owner stops committing and says so, and no guest is fenced."""
    store = MemoryStore(clock)
    owner = register(store)
    head = await owner.claim(Expectation.opening(), volumes=VOLUMES)
    for _ in range(2):
        old, head = head, await owner.commit(following(head))
    store.place("vm1/head", encode_head(old))
    with pytest.raises(CorruptionError, match="generation 1"):
        await owner.commit(following(head))
    assert stored(store) == old
    store.remove("vm1/head")
    with pytest.raises(CorruptionError, match="is gone"):
        await owner.commit(following(head))
    store.place("vm1/head", encode_head(old)[:-1] + b"!")
    with pytest.raises(CorruptionError, match="digest"):
        await owner.commit(following(head))
    with pytest.raises(CorruptionError, match="digest"):
        await owner.read()


@simulated
async def test_two_hosts_prove_that_they_see_one_store(clock: SimulatedClock) -> None:
    """A token written by one is read by the other; another store, or an erased token, is refused."""
    one, other = MemoryStore(clock), MemoryStore(clock)
    source, target, stranger = register(one, "source"), register(one, "target"), register(other)
    token = await source.write_proof()
    await target.check_proof(token)
    with pytest.raises(InvalidRequestError, match="another store"):
        await stranger.check_proof(token)
    with pytest.raises(InvalidRequestError):
        await target.check_proof("../head")
    await source.erase_proof(token)
    with pytest.raises(InvalidRequestError):
        await target.check_proof(token)
    assert one.snapshot() == {}


@simulated
async def test_only_an_owner_commits(clock: SimulatedClock) -> None:
    store = MemoryStore(clock)
    nobody = register(store)
    for call in (nobody.settle, nobody.confirm, nobody.release):
        with pytest.raises(InvariantError):
            await call()
    with pytest.raises(InvalidRequestError):
        await nobody.claim(Expectation.opening())
    assert await nobody.read() is None


async def race(clock: SimulatedClock) -> None:
    """Hosts claim and commit at once through a store that fails at random: one line of owners, one history."""
    store = MemoryStore(clock, latency_s=0.05)
    history: list[Head] = []
    kinds = [FaultKind.FAIL, FaultKind.LOSE_RESPONSE, FaultKind.LATE, FaultKind.SLOW_DOWN]

    def choose(operation):
        if clock.random.random() > 0.3:
            return None
        return Fault(clock.random.choice(kinds), delay_s=clock.random.uniform(0, 3))

    def check(operation) -> None:
        head = stored(store)
        if history:
            last = history[-1]
            assert head.generation in (last.generation, last.generation + 1)
            assert head.epoch in (last.epoch, last.epoch + 1)
            assert (head.epoch != last.epoch) == (head.incarnation != last.incarnation)
            assert head.generation == last.generation or head.epoch == last.epoch
        history.append(head)

    store.choose = choose
    store.on_mutation.append(check)

    async def host(name: str) -> int:
        owner = register(store, name)
        acknowledged = 0
        await asyncio.sleep(clock.random.uniform(0, 2))
        head = await owner.claim(Expectation.force(), volumes=VOLUMES)
        try:
            for _ in range(5):
                head = await owner.commit(following(head))
                acknowledged += 1
        except FencedError:
            assert stored(store).epoch > head.epoch
        return acknowledged

    async with asyncio.TaskGroup() as tasks:
        hosts = [tasks.create_task(host(name)) for name in "abc"]
    committed = history[-1].generation
    # What was acknowledged is there; at most the last commit of each fenced host went in unseen.
    acknowledged = sum(task.result() for task in hosts)
    assert acknowledged <= committed <= acknowledged + 3


def test_racing_hosts_make_one_history() -> None:
    explore(race, seeds=seeds(50))
