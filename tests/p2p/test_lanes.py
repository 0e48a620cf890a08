"""Pushes over several connections: nothing orders them among one another, and that does no harm.

The first half is a model of a source whose rounds arrive at a real installer over lanes that are delayed at will; each
of the rules that make this safe is left out once, and the model notices. The second half migrates, loses connections,
and counts what goes over the link.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import attrs
import numpy as np
import pytest
from blake3 import blake3

from silo.chunkmap import Residency
from silo.devices.delayed import DelayedDevice, Delays
from silo.devices.memory import MemoryDevice
from silo.errors import InvalidRequestError
from silo.events import LinkChanged
from silo.p2p.installer import Installer
from silo.p2p.messages import Invalidate, Round, VolumeOffer, set_messages
from silo.p2p.peer_source import PeerSource
from silo.p2p.records import HandoverBody, VolumeSets, pack_all, pack_set
from silo.p2p.settings import MigrationSettings
from silo.p2p.source import SourceMigration
from silo.p2p.terms import Terms
from silo.p2p.wire import ChunkFrame, Encoding
from silo.testing.loop import SimulatedClock, run_simulated
from tests.support.migration import QUICK
from tests.support.scene import Scene, simulate
from tests.support.seeds import seeds
from tests.support.volumes import CHUNK, make_volume

MIGRATION = b"m" * 16
CHUNKS = 6
ROUNDS = 4
LANES = 3


# ---- reordering ---------------------------------------------------------------------------------------------


def content(chunk: int, version: int) -> bytes:
    return bytes([chunk, version]) * (CHUNK // 2)


class Reordered:
    """One run: what a source has sent over its lanes, and what the target makes of it."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.chance = clock.random
        device = DelayedDevice(
            MemoryDevice(CHUNKS * CHUNK), Delays(write_s=0.01, jitter=1.0, decline=0.5), clock.random.random
        )
        self.volume = make_volume(device, Residency.ABSENT_STORE)[1]
        self.installer = Installer(MIGRATION, [self.volume], PeerSource(["disk"]), clock)
        self.version = [0] * CHUNKS
        self.missing = set(range(CHUNKS))
        """What the source must call missing in the end: its newest version was not acknowledged."""
        self.lanes: list[list[Any]] = [[] for _ in range(LANES)]
        self.late: list[ChunkFrame] = []
        """Pushed before the handover, over another lane, and not there when it comes."""

    def write_rounds(self) -> None:
        """Everything that is sent, in the order of each lane; bulk is the first."""
        for round_ in range(1, ROUNDS + 1):
            changed = [chunk for chunk in range(CHUNKS) if round_ == 1 or self.chance.random() < 0.5]
            for chunk in changed:
                self.version[chunk] += 1
            self.missing |= set(changed)
            lacking = np.array(sorted(self.missing), dtype=np.int64)
            self.lanes[0] += set_messages(Invalidate, round_, 0, lacking)
            self.lanes[0].append(Round(round=round_))
            for chunk in sorted(self.missing):
                if self.chance.random() < 0.8:
                    self.chance.choice(self.lanes).append(self._push(chunk, round_))
                    self.missing.discard(chunk)  # it will be acknowledged before the handover
                elif round_ == ROUNDS:
                    self.late.append(self._push(chunk, round_))
        for chunk in range(CHUNKS):
            if self.chance.random() < 0.3:  # written after the last round
                self.version[chunk] += 1
                self.missing.add(chunk)

    def _push(self, chunk: int, round_: int) -> ChunkFrame:
        data = content(chunk, self.version[chunk])
        return ChunkFrame(
            MIGRATION, round_, 0, chunk, CHUNK, blake3(data).digest(), Encoding.RAW, memoryview(data)
        )

    async def receive(self, lane: int) -> None:
        """As `silo.p2p.target_session` does."""
        for sent in self.lanes[lane]:
            await asyncio.sleep(self.chance.choice((0.0, 0.0, 0.003, 0.02)))
            if isinstance(sent, ChunkFrame):
                if lane:
                    await self.installer.until_announced(sent.round)
                await self.installer.install(sent)
            elif isinstance(sent, Round):
                self.installer.announce(sent)
            else:
                await self.installer.invalidate(sent)

    async def hand_over(self) -> None:
        body = self._handover()
        await self.installer.apply(body)
        await asyncio.sleep(self.chance.choice((0.0, 0.01)))  # the record is written
        self.installer.settle(body)

    async def receive_late(self) -> None:
        for sent in self.late:
            await asyncio.sleep(self.chance.choice((0.0, 0.003)))
            await self.installer.until_announced(sent.round)
            await self.installer.install(sent)

    async def play(self) -> int:
        """Raises ``AssertionError`` when the target has anything old; else how many chunks it has."""
        self.write_rounds()
        async with asyncio.TaskGroup() as tasks:
            for lane in range(LANES):
                tasks.create_task(self.receive(lane))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.hand_over())
            tasks.create_task(self.receive_late())
        there = 0
        for chunk in range(CHUNKS):
            if self.volume.chunks.residency(chunk) is Residency.PRESENT:
                there += 1
                assert chunk not in self.missing
                found = bytes(await self.volume.device.read(chunk * CHUNK, CHUNK))
                is_newest = found == content(chunk, self.version[chunk])
                assert is_newest, f"chunk {chunk} is an older one"
            else:
                assert chunk in self.missing, f"chunk {chunk} was acknowledged and is not there"
        return there

    def _handover(self) -> HandoverBody:
        shape = self.volume.geometry
        offer = VolumeOffer(
            name="disk", size=shape.size, chunk_size=shape.chunk_size, block_size=shape.block_size, used=0
        )
        sets = VolumeSets(
            volume=offer,
            missing=pack_set(np.array(sorted(self.missing), dtype=np.int64)),
            unsynced=pack_all(CHUNKS),
        )
        terms = Terms(epoch=1, incarnation="a", generations=(1,), nonce="n")
        return HandoverBody(
            migration=MIGRATION, group="group", source_host="a", terms=terms, volumes=(sets,), state=b""
        )


async def reordered(clock: SimulatedClock) -> int:
    return await Reordered(clock).play()


@pytest.mark.sim
def test_whatever_order_lanes_arrive_in_nothing_old_counts():
    """What was acknowledged is there, in its newest version; what was not is absent."""
    assert sum(run_simulated(reordered, seed=seed) for seed in seeds(60)) > 60


async def _at_once(_installer: Installer, _round: int) -> None:
    """As if every round had been announced."""


def _open_to_the_end(self: Installer, round_: int, volume: int, chunk: int) -> bool:
    """As if a handover changed nothing before it is settled."""
    self._is_closing = False
    return is_current(self, round_, volume, chunk)


is_current = Installer._is_current
RULES = {
    "what comes too early waits": ("until_announced", _at_once),
    "what comes after the handover is refused": ("_is_current", _open_to_the_end),
    "what comes too late is refused": ("_is_current", lambda *_: True),
}


@pytest.mark.sim
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_needed(rule, monkeypatch):
    """Without it, some order of arrival leaves something old, or loses what was acknowledged."""
    monkeypatch.setattr(Installer, *RULES[rule])
    broken = 0
    for seed in range(60):
        try:
            run_simulated(reordered, seed=seed)
        except AssertionError:
            broken += 1
    assert broken


# ---- migrations over several lanes --------------------------------------------------------------------------


def with_lanes(count: int, **changes: Any) -> MigrationSettings:
    return attrs.evolve(QUICK, connections=count, **changes)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_group_moves_over_so_many_lanes(count, seed):
    """Under a guest that writes all the while."""

    async def play(here: Scene) -> None:
        await here.migrate()
        await here.check_moved()

    assert simulate(play, seed=seed, settings=with_lanes(count))


def small_batches(source: SourceMigration) -> None:
    """So that even these small disks are many."""
    planner = source._link._pusher._planner
    take = planner.take_batch
    planner.take_batch = lambda _size: take(2 * CHUNK)


def repetitions(here: Scene) -> Counter[tuple[int, int]]:
    """Counts what the target is asked to install although it has it."""
    again: Counter[tuple[int, int]] = Counter()
    installer = here.target._installer
    install = installer.install

    async def counted(frame: ChunkFrame) -> None:
        has = installer.volumes[frame.volume].chunks.residency(frame.chunk) is Residency.PRESENT
        again[frame.volume, frame.chunk] += has and installer._is_current(*frame[1:4])
        await install(frame)

    installer.install = counted
    return again


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 3])
def test_what_was_installed_is_not_sent_again(count, seed):
    """The link is cut over and over; what was lost on its way comes again, and nothing else does."""

    async def play(here: Scene) -> None:
        here.guest.writes = 0.0
        await asyncio.sleep(0.05)
        source = here.source()
        small_batches(source)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(source.run())
            await here.until(lambda: here.target is not None)
            again = repetitions(here)
            for _ in range(4):
                await asyncio.sleep(here.world.clock.random.uniform(0.1, 0.3))
                here.network.cut("a", "b")
            await running
        await here.check_moved()
        ups = [event for event in here.a.events if isinstance(event, LinkChanged) and event.up]
        assert len(ups) >= 3
        assert not +again

    settings = with_lanes(count, rate_bps=40.0 * CHUNK)
    assert simulate(play, seed=seed, settings=settings)


@pytest.mark.parametrize("seed", range(3))
def test_a_lane_that_breaks_slows_down_and_nothing_else(seed):
    """Others go on meanwhile; the link does not count as broken."""

    async def play(here: Scene) -> None:
        source = here.source()
        small_batches(source)
        broken = 0
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(source.run())
            await here.until(lambda: here.target is not None)
            session = here.target._session
            while not running.done() and broken < 10:
                for channel in list(session._pushing.values())[:1]:
                    await channel.aclose()
                    broken += 1
                await asyncio.sleep(0.05)
            await running
        await here.check_moved()
        assert broken > 3
        assert not [event for event in here.a.events if isinstance(event, LinkChanged) and not event.up]

    assert simulate(play, seed=seed, settings=with_lanes(3, rate_bps=100.0 * CHUNK))


@pytest.mark.parametrize("count", [0, 17, -1])
def test_so_many_lanes_are_refused(count):
    """At least one, and not so many that a target has none left for others."""
    with pytest.raises(InvalidRequestError, match="connections"):
        MigrationSettings(connections=count)
