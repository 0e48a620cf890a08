"""Hosts sync, die, restart and take over, through a store that fails; what does a restorer find, at every moment?

After every change of the head its generation is restored from a copy of the store: the image of all volumes must
have been possible at the instant of its cut. A generation that somebody was told of is never missing later. A host
that comes back with its disk goes on where it was; one that comes back with nothing restores lazily and finds
exactly what the head says; one that is replaced while it lives is fenced and changes nothing any more.
"""

from __future__ import annotations

import asyncio
import contextlib

import attrs
import pytest

from silo.chunkmap import SYNC_DIRTY, ChunkMap, Residency, after_restart
from silo.devices.volatile import VolatileDevice
from silo.errors import FencedError
from silo.sync.claim import Expectation, Owner
from silo.sync.committer import volume_infos
from silo.sync.head import parse_head
from silo.sync.memory_store import MemoryClient, MemoryStore
from silo.sync.reader import StoreReader
from silo.sync.register import Register
from silo.sync.settings import FetchSettings, RetrySettings, SyncSettings
from silo.sync.store_faults import Fault, FaultKind, Operation
from silo.sync.store_source import StoreSource
from silo.sync.syncer import Syncer
from silo.testing.loop import SimulatedClock, explore
from silo.testing.process import SimulatedProcess
from tests.sim.oracle import Oracle, stamps_of
from tests.sim.volume_world import CHUNK, CHUNKS, NAMES, SIZE, World, guest
from tests.support.logs import ExpectedLogs
from tests.support.seeds import seeds
from tests.support.sync import restored

RETRY = RetrySettings(delay_min_s=0.01, delay_max_s=0.2, request_timeout_s=2.0)
SETTINGS = SyncSettings(
    rpo_s=0.2,
    segment_size=512,  # what guests write is compressed well: this is a few chunks
    window=1024,
    batch_size=CHUNK,
    checkpoint_segments=2,
    drain_timeout_s=60.0,
    retry=RETRY,
)
AHEAD = attrs.evolve(SETTINGS, cut_size=CHUNK, round_size=3 * CHUNK)
"""With more than a chunk to store, most of it goes ahead of the cut."""
FETCH = FetchSettings(run_size=2 * CHUNK, background_lanes=2, patience_s=30.0, retry=RETRY)
KINDS = (FaultKind.FAIL, FaultKind.LOSE_RESPONSE, FaultKind.LATE, FaultKind.SLOW_DOWN, FaultKind.DELAY)

Allowed = dict[str, list[set[int]]]


class SyncWorld(World):
    """A `World` whose disks the store has never seen, the store, and what was possible at each cut."""

    def __init__(self, clock: SimulatedClock) -> None:
        super().__init__(clock)
        for name in NAMES:
            self.disks[name].write_nowait(0, self.committed[name])
            for chunk in range(CHUNKS):
                content = self.committed[name][chunk * CHUNK : (chunk + 1) * CHUNK]
                self.states[name][chunk] = (
                    Residency.PRESENT if any(content) else Residency.ZERO
                ) | SYNC_DIRTY
        self.store = MemoryStore(clock, latency_s=0.01, timeout_s=1.0)
        self.store.choose = self.choose_fault
        self.store.lands = lambda operation: clock.random.choice((None, clock.random.uniform(0, 2)))
        self.store.on_mutation.append(self.look)
        self.trouble = clock.random.choice((0.0, 0.1, 0.3))
        self.cuts: list[tuple[float, Allowed]] = []
        self.generations: list[MemoryStore] = []
        self.promised = 0
        """The newest generation that a caller of `sync_now` was told of."""
        self.owners: list[Owner] = []
        """What the state directory would remember."""
        self.client: MemoryClient | None = None
        self.opened: list[Syncer] = []
        self.rounds = 0
        """Stored ahead of cuts, by processes that have died."""

    def bury(self) -> None:
        """The process is dead: its requests get no further, and the kernel closes its files."""
        if self.client is not None:
            self.client.kill()
        while self.opened:
            syncer = self.opened.pop()
            self.rounds += syncer._ahead.rounds
            syncer._committer.close()
            syncer.manifest.close()

    def choose_fault(self, operation: Operation) -> Fault | None:
        if self.chance.random() >= self.trouble:
            return None
        return Fault(self.chance.choice(KINDS), delay_s=self.chance.uniform(0, 2))

    def look(self, operation: Operation) -> None:
        if operation.key == "vm/head":
            self.generations.append(self.store.clone())

    async def prepare(self, owner: Owner, nonce: str) -> None:
        self.owners.append(owner)
        await asyncio.sleep(self.chance.choice((0, 0.01)))

    async def check(self, store: MemoryStore) -> dict[str, bytes]:
        """Restore the generation that a store shows and find the cut that it was."""
        head = parse_head(store.snapshot()["vm/head"], "vm")
        images = await restored(store.client(), self.clock, "vm")
        candidates = [allowed for cut_time, allowed in self.cuts if cut_time == head.cut_time]
        assert candidates, f"generation {head.generation} is of no cut"
        for allowed in candidates:
            with contextlib.suppress(AssertionError):
                for name, oracle in self.oracles.items():
                    oracle.check(images[name], allowed[name], 0, "a generation")
                return images
        for name, oracle in self.oracles.items():
            oracle.check(images[name], candidates[-1][name], 0, f"generation {head.generation}")
        raise AssertionError("unreachable")

    async def check_all(self) -> None:
        """Every generation since the last call, and the promises."""
        found, self.generations = self.generations, []
        newest = 0
        for store in found:
            head = parse_head(store.snapshot()["vm/head"], "vm")
            if head.generation:
                await self.check(store)
                self.commits += head.generation > newest
            assert head.generation >= newest
            newest = head.generation
        if found:
            assert newest >= self.promised


async def open_here(
    world: SyncWorld, expectation: Expectation, adopt: SyncWorld | None
) -> tuple[Syncer, StoreSource]:
    """What a host does when it opens its group: claim, look at the store, record every cut that is taken."""
    group = world.start()
    world.client = client = world.store.client(f"host-{len(world.owners)}")
    register = Register(client, "vm", world.clock, RETRY)
    await register.claim(expectation, volumes=volume_infos(group), prepare=world.prepare)
    assert register.owner is not None
    world.owners = [register.owner]
    if adopt is not None:
        await take_over(world, adopt)
    settings = world.chance.choice((SETTINGS, AHEAD))
    syncer = await Syncer.open(group, register, client, world.clock, settings, fetch=FETCH)
    world.opened.append(syncer)
    take = group.take

    def take_and_remember():
        cut = take()
        world.cuts.append((cut.time_wall, {name: oracle.now() for name, oracle in world.oracles.items()}))
        return cut

    group.take = take_and_remember  # type: ignore[method-assign]
    source = StoreSource(syncer.manifest, StoreReader(client, world.clock, FETCH))
    for volume in group.volumes.values():
        volume.set_source(Residency.ABSENT_STORE, source)
    return syncer, source


async def at_work(
    world: SyncWorld, expectation: Expectation, *, requests: int = 1000, adopt: SyncWorld | None = None
) -> None:
    """A host with guests. With few requests it comes to an end and stores everything."""
    syncer, source = await open_here(world, expectation, adopt)

    async def ask() -> None:
        while True:
            await asyncio.sleep(world.chance.uniform(0, 0.3))
            world.promised = max(world.promised, await syncer.sync_now())

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(syncer.run())
        asking = tasks.create_task(ask())
        async with asyncio.TaskGroup() as guests:
            for number in range(3):
                guests.create_task(guest(world, requests), name=f"guest-{number}")
        asking.cancel()
        world.trouble = 0.0
        await syncer.close()
        await running
        await source.aclose()


async def take_over(world: SyncWorld, old: SyncWorld) -> None:
    """What the store shows now is the truth from here on; it must be a cut of ``old``."""
    store = old.store.clone()
    images = await old.check(store)
    for name in NAMES:
        world.oracles[name] = Oracle(name, stamps_of(images[name]))
    head = parse_head(store.snapshot()["vm/head"], "vm")
    world.cuts = [(head.cut_time, {name: oracle.now() for name, oracle in world.oracles.items()})]


def lose_disk(world: SyncWorld) -> None:
    """New disks, of which nothing is known but that the store has everything."""
    for name in NAMES:
        world.disks[name] = VolatileDevice(SIZE)
        world.states[name] = bytearray([Residency.ABSENT_STORE]) * CHUNKS


async def die_and_return(clock: SimulatedClock) -> tuple[int, int, int]:
    """The scenario: killed at any step, three times, with or without loss of the disk; in the end all is stored."""
    world = SyncWorld(clock)
    expectation = Expectation.opening()
    for _ in range(3):
        work = at_work(world, expectation)
        async with SimulatedProcess(work, kill_after=clock.random.randrange(6000)) as process:
            await process.wait_ended()
        world.bury()
        await asyncio.sleep(clock.random.choice((0, 3)))  # before or after its last requests have landed
        await world.check_all()
        stored = "vm/head" in world.store.snapshot()
        newest = parse_head(world.store.snapshot()["vm/head"], "vm").generation if stored else 0
        if newest and clock.random.random() < 0.5:
            await take_over(world, world)
            lose_disk(world)
            expectation = Expectation.force()
            continue
        for name in NAMES:
            after_restart(ChunkMap(world.states[name], CHUNKS).view)
        expectation = Expectation.opening(*world.owners) if stored else Expectation.opening()
        if not newest and not stored:
            world.owners.clear()
    world.limits = world.limits.__class__(memory=1 << 20, spill=0)
    await at_work(world, expectation, requests=10)
    await world.check_all()
    images = await restored(world.store.client(), clock, "vm")
    for name, oracle in world.oracles.items():
        oracle.check(images[name], oracle.now(), 0, "the end")
    return world.commits, world.promised, world.rounds


async def be_replaced(clock: SimulatedClock) -> int:
    """The scenario: a host is cut off, or only slow, when another one takes its group by force; both have guests."""
    old = SyncWorld(clock)
    ended: list[bool] = []

    async def work_until_fenced() -> None:
        try:
            await at_work(old, Expectation.opening())
        except* FencedError:
            ended.append(True)

    async with SimulatedProcess(work_until_fenced()) as process:
        while not any(parse_head(s.snapshot()["vm/head"], "vm").generation for s in old.generations):
            await asyncio.sleep(0.1)
        await asyncio.sleep(clock.random.uniform(0, 1))
        assert old.client is not None
        old.client.offline = clock.random.random() < 0.5
        new = SyncWorld(clock)
        new.store = old.store
        heads_of_old, old.generations = old.generations, []
        new.trouble = 0.0
        lose_disk(new)
        # All heads are seen by the world that made the store; sort them by their owner afterwards.
        await at_work(new, Expectation.force(), requests=10, adopt=old)
        old.client.offline = False
        await process.wait_ended()
        assert ended == [True]
    old.bury()
    claimed = [parse_head(s.snapshot()["vm/head"], "vm").epoch for s in old.generations].index(2)
    heads_of_old += old.generations[:claimed]
    new.generations = old.generations[claimed:]
    old.generations = heads_of_old
    await old.check_all()
    await new.check_all()
    images = await restored(new.store.client(), clock, "vm")
    for name, oracle in new.oracles.items():
        oracle.check(images[name], oracle.now(), 0, "the end")
    return new.commits


@pytest.mark.sim
def test_a_living_host_is_replaced(expect_log: ExpectedLogs) -> None:
    """The old one is fenced, and nothing it had under way reaches what the new one shows."""
    commits = explore(be_replaced, seeds=seeds(12))
    assert sum(commits) > len(commits)
    expect_log("belongs to another writer")
    if expect_log.matching("a cut was abandoned"):
        expect_log("a cut was abandoned")


@pytest.mark.sim
def test_hosts_die_and_return(expect_log: ExpectedLogs) -> None:
    """Whatever a restorer finds was one instant of both volumes, and no promise is broken."""
    outcomes = explore(die_and_return, seeds=seeds(20))
    assert sum(commits for commits, _, _ in outcomes) > 5 * len(outcomes)
    assert sum(promised for _, promised, _ in outcomes) > len(outcomes)
    assert sum(rounds for _, _, rounds in outcomes) > 5 * len(outcomes)
    if expect_log.matching("a cut was abandoned"):
        expect_log("a cut was abandoned")
