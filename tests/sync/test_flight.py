"""Single flight."""

from __future__ import annotations

import asyncio

import pytest

from silo.errors import UnavailableError
from silo.sync.flight import SingleFlight


async def test_concurrent_calls_share_one_run_and_later_ones_do_not() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    gate = asyncio.Event()
    runs = 0

    async def call() -> int:
        nonlocal runs
        runs += 1
        await gate.wait()
        return runs

    async with asyncio.TaskGroup() as tasks:
        some = [tasks.create_task(flights.run("a", call)) for _ in range(5)]
        other = tasks.create_task(flights.run("b", call))
        await asyncio.sleep(0)
        gate.set()
    assert [task.result() for task in some] == [2] * 5
    assert other.result() == 2
    assert await flights.run("a", call) == 3


async def test_an_error_is_shared() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    gate = asyncio.Event()
    runs = 0

    async def call() -> int:
        nonlocal runs
        runs += 1
        await gate.wait()
        raise UnavailableError("away")

    async def expect() -> None:
        with pytest.raises(UnavailableError):
            await flights.run("a", call)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(expect())
        await asyncio.sleep(0)
        gate.set()
    assert runs == 1


async def test_when_the_first_caller_is_cancelled_another_runs_it() -> None:
    """And a follower that is cancelled disturbs nobody."""
    flights: SingleFlight[str, str] = SingleFlight()
    gate = asyncio.Event()
    runners: list[str] = []

    async def ask(name: str) -> str:
        async def call() -> str:
            runners.append(name)
            await gate.wait()
            return name

        return await flights.run("a", call)

    async with asyncio.TaskGroup() as tasks:
        first, second, third = (tasks.create_task(ask(name)) for name in ("first", "second", "third"))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        first.cancel()
        while runners != ["first", "third"]:
            await asyncio.sleep(0)
        gate.set()
    assert third.result() == "third"
    assert first.cancelled()
    assert second.cancelled()
