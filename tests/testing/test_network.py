"""The simulated network is a transport, and fails in the ways that it promises."""

from __future__ import annotations

import asyncio

import pytest

from silo.errors import UnavailableError
from silo.testing.check_transport import check_transport
from silo.testing.loop import SimulatedClock, explore, run_simulated
from silo.testing.network import MemoryNetwork


def test_it_keeps_the_contract():
    """The network in memory passes the same checks as real sockets, with and without latency."""

    async def scenario(clock: SimulatedClock) -> None:
        network = MemoryNetwork(latency_s=lambda: clock.random.choice((0.0, 0.001, 0.02)))
        await check_transport(network.host("b"), "tcp:b:1", dialler=network.host("a"))

    assert explore(scenario, seeds=range(5)) == [None] * 5


def test_a_cut_breaks_both_ends_and_loses_what_was_under_way():
    """After a cut both ends fail, and a new connection can be made at once."""

    async def scenario(clock: SimulatedClock) -> int:
        network = MemoryNetwork(latency_s=lambda: 0.1)
        listener = await network.host("b").listen("tcp:b:1")
        here = await network.host("a").connect("tcp:b:1")
        there = await listener.accept()
        await here.send([b"lost"])
        cut = network.cut("a", "b")
        for end in (here, there):
            with pytest.raises(UnavailableError):
                await end.receive_into(memoryview(bytearray(4)))
        again = await network.host("a").connect("tcp:b:1")
        await again.aclose()
        await listener.aclose()
        return cut

    assert run_simulated(scenario, seed=1) == 1


def test_a_partition_is_silent():
    """During a partition nothing arrives and nothing fails; healing it cuts what lived through it."""

    async def scenario(clock: SimulatedClock) -> str:
        network = MemoryNetwork()
        listener = await network.host("b").listen("tcp:b:1")
        here = await network.host("a").connect("tcp:b:1")
        there = await listener.accept()
        network.partition("a", "b")
        await here.send([b"vanished"])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await there.receive_into(memoryview(bytearray(8)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await network.host("a").connect("tcp:b:1")
        network.heal("a", "b")
        with pytest.raises(UnavailableError):
            await there.receive_into(memoryview(bytearray(8)))
        await listener.aclose()
        return "silent"

    assert run_simulated(scenario, seed=1) == "silent"
