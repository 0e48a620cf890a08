"""Open, closed, failed: who may pass, who waits, and what draining waits for."""

from __future__ import annotations

import asyncio

import pytest

from silo.errors import FencedError
from silo.gate import Gate
from tests.support.held import everything_else, interleaved


@interleaved
async def test_an_open_gate_lets_pass_without_waiting():
    """Nothing is awaited, so nobody can come in between."""
    gate = Gate()
    with pytest.raises(StopIteration):
        gate.wait_open().send(None)
    assert gate.is_open


@interleaved
async def test_a_closed_gate_holds_until_it_reopens():
    """Waiters pass when it opens, and not when it closes again before they could."""
    gate = Gate(is_open=False)
    async with asyncio.TaskGroup() as tasks:
        waiter = tasks.create_task(gate.wait_open())
        await everything_else()
        gate.reopen()
        await gate.close_and_drain()
        await everything_else()
        assert not waiter.done()
        gate.reopen()
    assert gate.is_open


@interleaved
async def test_draining_waits_for_every_device_phase():
    """Two phases overlap; the gate is drained when both have ended, also when one of them failed."""
    gate = Gate()
    go = [asyncio.Event(), asyncio.Event()]

    async def phase(number: int) -> None:
        with pytest.raises(ZeroDivisionError), gate.device_phase():
            await go[number].wait()
            raise ZeroDivisionError

    async with asyncio.TaskGroup() as tasks:
        for number in (0, 1):
            tasks.create_task(phase(number))
        await everything_else()
        drained = tasks.create_task(gate.close_and_drain())
        for event in go:
            await everything_else()
            assert not drained.done()
            assert not gate.is_open
            event.set()
    assert drained.done()


@interleaved
async def test_draining_twice_and_when_idle_is_harmless():
    """Nothing is under way: it returns at once, any number of times."""
    gate = Gate()
    await gate.close_and_drain()
    await gate.close_and_drain()
    assert not gate.is_open


@interleaved
async def test_a_cancelled_drain_leaves_the_gate_closed():
    """Whoever gave up decides what follows."""
    gate = Gate()
    with gate.device_phase():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await gate.close_and_drain()
        assert not gate.is_open


@interleaved
async def test_failing_ends_waiting_and_later_requests():
    """The error reaches who waits, who comes later, and who tries to reopen; the first error stays."""
    gate = Gate(is_open=False)
    error = FencedError("epoch 3 is over")
    async with asyncio.TaskGroup() as tasks:

        async def wait() -> None:
            with pytest.raises(FencedError, match="epoch 3"):
                await gate.wait_open()

        tasks.create_task(wait())
        await everything_else()
        gate.fail(error)
        gate.fail(FencedError("epoch 4 is over"))
    gate.reopen()
    assert not gate.is_open
    await gate.close_and_drain()
    with pytest.raises(FencedError, match="epoch 3"):
        await gate.wait_open()


@interleaved
async def test_a_failed_gate_does_not_collect_tracebacks():
    """The error is raised to every request of a guest that goes on trying; it must not grow with each."""
    gate = Gate()
    error = FencedError("over")
    gate.fail(error)

    def depth() -> int:
        frames, trace = 0, error.__traceback__
        while trace is not None:
            frames, trace = frames + 1, trace.tb_next
        return frames

    depths = set()
    for _ in range(5):
        with pytest.raises(FencedError):
            await gate.wait_open()
        depths.add(depth())
    assert len(depths) == 1


@interleaved
async def test_a_stalled_gate_opens_by_itself_and_a_closed_one_does_not():
    """Whoever may not serve is asked before anybody passes, and a confirmation wakes who waits."""
    gate = Gate()
    may = [True]
    gate.may_serve = lambda: may[0]
    gate.look()
    assert gate.is_open
    may[0] = False
    async with asyncio.TaskGroup() as tasks:
        waiter = tasks.create_task(gate.wait_open())
        await everything_else()
        assert not waiter.done()
        assert not gate.is_open
        assert not gate.is_closed
        may[0] = True
        gate.look()
        await waiter
    await gate.close_and_drain()
    gate.look()
    assert not gate.is_open
    may[0] = False
    gate.reopen()
    assert not gate.is_open
    may[0] = True
    gate.look()
    assert gate.is_open
    gate.fail(FencedError("another host"))
    gate.look()
    assert not gate.is_open
