"""Demands: said on every link until they are answered, by whatever brings the chunk."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from silo.errors import UnavailableError
from silo.p2p.channel import Channel
from silo.p2p.conversation import Phase, Side
from silo.p2p.messages import Want, decode
from silo.p2p.peer_source import PeerSource
from silo.tasks import task_group
from silo.testing.loop import SimulatedClock, run_simulated
from silo.testing.network import MemoryNetwork
from tests.support.migration import QUICK


class Lanes:
    """Demand lanes to a source that only listens."""

    def __init__(self, clock: SimulatedClock, tasks: asyncio.TaskGroup, peer: PeerSource) -> None:
        self.clock, self.tasks, self.peer = clock, tasks, peer
        self._saying: asyncio.Task[None] | None = None
        self._ends: list[Channel] = []

    async def open(self) -> None:
        """A new lane, after the one before broke."""
        await self.close()
        pair = MemoryNetwork().join("a", "b")
        self._ends = [
            Channel(end, side, self.clock, QUICK)
            for end, side in zip(pair, (Side.SOURCE, Side.TARGET), strict=True)
        ]
        for end in self._ends:
            end.conversation.phase = Phase.DEMAND
        self._saying = self.tasks.create_task(self.peer.demand(self._ends[1]))

    async def heard(self) -> list[tuple[int, int]]:
        """The next demands."""
        wants = [decode(frame) for frame in await self._ends[0].receive()]
        return [(want.volume, want.chunk) for want in wants if isinstance(want, Want)]

    async def close(self) -> None:
        if self._saying is not None:
            self._saying.cancel()
            await asyncio.wait((self._saying,))
        for end in self._ends:
            await end.aclose()


def play(scenario) -> bool:
    async def run(clock: SimulatedClock) -> None:
        peer = PeerSource(["disk", "memory"])
        async with task_group() as tasks:
            lanes = Lanes(clock, tasks, peer)
            await scenario(peer, lanes, tasks)
            await lanes.close()

    run_simulated(run, seed=1)
    return True


def test_a_demand_is_said_again_until_it_is_answered():
    """A fetch outlives links; two fetches of one chunk are one demand."""

    async def scenario(peer: PeerSource, lanes: Lanes, tasks: asyncio.TaskGroup) -> None:
        first = tasks.create_task(peer.fetch("memory", 5, demand=True))
        second = tasks.create_task(peer.fetch("memory", 5, demand=False))
        await lanes.open()
        assert await lanes.heard() == [(1, 5)]
        await lanes.open()
        assert await lanes.heard() == [(1, 5)]
        assert peer.arrived(1, 5, memoryview(b"content"))
        assert await first == await second == b"content"
        assert not peer.arrived(1, 5, b"again")

    assert play(scenario)


def test_what_nobody_waits_for_any_more_is_not_demanded():
    """A cancelled fetch is forgotten; another one of the same chunk is not."""

    async def scenario(peer: PeerSource, lanes: Lanes, tasks: asyncio.TaskGroup) -> None:
        gone = tasks.create_task(peer.fetch("disk", 1, demand=True))
        one, other = (tasks.create_task(peer.fetch("disk", 2, demand=True)) for _ in range(2))
        await asyncio.sleep(0.1)
        gone.cancel()
        one.cancel()
        await asyncio.wait((gone, one))
        await lanes.open()
        assert await lanes.heard() == [(0, 2)]
        assert not peer.arrived(0, 1, b"late")
        assert peer.arrived(0, 2, None)
        assert await other is None

    assert play(scenario)


def test_zeros_answer_too():
    """Runs of zeros that are pushed answer the fetches of their chunks, and no others."""

    async def scenario(peer: PeerSource, lanes: Lanes, tasks: asyncio.TaskGroup) -> None:
        fetches = {
            chunk: tasks.create_task(peer.fetch("disk", chunk, demand=True)) for chunk in (1, 5, 9, 12)
        }
        await asyncio.sleep(0.1)
        peer.arrived_zeros(1, np.array([1, 5]))
        peer.arrived_zeros(0, np.array([], dtype=np.int64))
        peer.arrived_zeros(0, np.array([0, 5, 6, 9]))
        await asyncio.sleep(0.1)
        assert [chunk for chunk, fetch in fetches.items() if fetch.done()] == [5, 9]
        for chunk in (1, 12):
            peer.arrived(0, chunk, b"x")

    assert play(scenario)


def test_a_chunk_that_the_source_cannot_read_is_an_error():
    """Only the source's own word ends a fetch without content; the next fetch asks again."""

    async def scenario(peer: PeerSource, lanes: Lanes, tasks: asyncio.TaskGroup) -> None:
        async def fails() -> None:
            with pytest.raises(UnavailableError, match="bad sector"):
                await peer.fetch("disk", 3, demand=True)

        failing = tasks.create_task(fails())
        await asyncio.sleep(0.1)
        peer.unavailable(0, 3, "bad sector")
        await failing
        again = tasks.create_task(peer.fetch("disk", 3, demand=True))
        await lanes.open()
        assert await lanes.heard() == [(0, 3)]
        peer.arrived(0, 3, b"fine")
        assert await again == b"fine"

    assert play(scenario)
