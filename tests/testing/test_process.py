"""Killing simulated processes: at once, for ever, between any two steps."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from silo.testing.loop import Deadlock, SimulatedClock, SimulationError, explore, run_simulated
from silo.testing.process import SimulatedProcess
from silo.threads import run_to_completion


def test_a_process_that_is_not_killed_just_runs():
    """It ends as its coroutine does, and its error comes out."""

    async def scenario(clock: SimulatedClock) -> None:
        done: list[int] = []

        async def works() -> None:
            await asyncio.sleep(1)
            done.append(1)

        async def fails() -> None:
            await asyncio.sleep(1)
            raise ZeroDivisionError

        async with SimulatedProcess(works()) as process:
            await process.wait_ended()
        assert done == [1]
        assert not process.killed
        with pytest.raises(ZeroDivisionError):
            async with SimulatedProcess(fails()):
                await asyncio.sleep(2)

    explore(scenario, seeds=range(10))


def test_leaving_cancels():
    """Leaving the block stops the process as a cancellation does: its clean-up runs."""

    async def scenario(clock: SimulatedClock) -> list[str]:
        log: list[str] = []

        async def main() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(1)
                log.append("cleaned up")

        async with SimulatedProcess(main()):
            await asyncio.sleep(1)
        return log

    assert run_simulated(scenario, seed=0) == ["cleaned up"]


def test_killing_stops_tasks_timers_and_calls_and_runs_no_clean_up():
    """Nothing that the process started happens after its death, however long one waits."""

    async def scenario(clock: SimulatedClock) -> list[str]:
        log: list[str] = []

        async def ticks() -> None:
            try:
                while True:
                    await asyncio.sleep(1)
                    log.append("tick")
            finally:
                log.append("clean-up")

        async def main() -> None:
            asyncio.get_running_loop().call_later(5, log.append, "timer")
            async with asyncio.TaskGroup() as group:
                group.create_task(ticks())
                await asyncio.sleep(2.7)
                await run_to_completion(None, log.append, "call")
                await asyncio.sleep(3600)

        async with SimulatedProcess(main()) as process:
            await asyncio.sleep(2.5)
            process.kill()
            await process.wait_ended()
            await asyncio.sleep(100)
            return list(log)

    assert explore(scenario, seeds=range(10)) == [["tick", "tick"]] * 10


def test_a_crash_at_every_await():
    """Over all numbers of steps, a two-step update is seen undone, half done and done, and never otherwise."""

    def crash_after(steps: int) -> tuple[int, int, bool]:
        async def scenario(clock: SimulatedClock) -> tuple[int, int, bool]:
            disk = {"a": 0, "b": 0}

            async def update() -> None:
                for name in disk:
                    await asyncio.sleep(0)
                    await run_to_completion(None, disk.__setitem__, name, 1)

            async with SimulatedProcess(update(), kill_after=steps) as process:
                await process.wait_ended()
            await asyncio.sleep(1)
            return disk["a"], disk["b"], process.killed

        return run_simulated(scenario, seed=steps)

    outcomes = [crash_after(steps) for steps in range(40)]
    assert [
        outcome for before, outcome in zip([None, *outcomes], outcomes, strict=False) if outcome != before
    ] == [
        (0, 0, True),
        (1, 0, True),
        (1, 1, True),
        (1, 1, False),
    ]


def test_what_outlives_the_process_happens():
    """A message on its way has a context of its own and arrives after its sender's death."""

    async def scenario(clock: SimulatedClock) -> str:
        inbox: asyncio.Queue[str] = asyncio.Queue()

        async def sends() -> None:
            asyncio.get_running_loop().call_later(1, inbox.put_nowait, "hello", context=contextvars.Context())
            await asyncio.sleep(3600)

        async with SimulatedProcess(sends()) as process:
            await asyncio.sleep(0.5)
            process.kill()
            return await inbox.get()

    assert run_simulated(scenario, seed=0) == "hello"


def test_a_process_killed_by_itself_never_gets_past_its_next_await():
    """A fault that strikes inside the process kills it there."""

    async def scenario(clock: SimulatedClock) -> list[str]:
        log: list[str] = []

        async def main() -> None:
            log.append("before")
            process.kill()
            await asyncio.sleep(0)
            log.append("after")

        process = SimulatedProcess(main())
        async with process:
            await asyncio.sleep(1)
        return log

    assert run_simulated(scenario, seed=0) == ["before"]


def test_waiting_for_the_dead_is_a_deadlock_of_the_living_only():
    """A deadlock report names who still waits, not who cannot."""

    async def scenario(clock: SimulatedClock) -> None:
        lock = asyncio.Lock()

        async def main() -> None:
            async with lock:
                await asyncio.sleep(3600)

        async with SimulatedProcess(main(), name="deceased") as process:
            await asyncio.sleep(1)
            process.kill()
            await lock.acquire()

    with pytest.raises(Deadlock) as caught:
        run_simulated(scenario, seed=0)
    assert "acquire" in str(caught.value)
    assert "deceased" not in str(caught.value)


def test_tasks_that_a_living_process_left_behind_fail_the_run():
    """A process that ends must have awaited what it started; only a killed one is excused."""

    async def scenario(clock: SimulatedClock) -> None:
        async def main() -> None:
            kept.append(asyncio.get_running_loop().create_task(asyncio.sleep(3600), name="stray"))

        async with SimulatedProcess(main()) as process:
            await process.wait_ended()

    kept: list[asyncio.Task[None]] = []
    with pytest.raises(SimulationError, match="stray"):
        run_simulated(scenario, seed=0)


async def test_a_process_needs_the_simulated_loop():
    """On a real loop it refuses to start."""

    async def main() -> None:
        pass

    coroutine = main()
    with pytest.raises(TypeError, match="run_simulated"):
        await SimulatedProcess(coroutine).__aenter__()
    coroutine.close()
