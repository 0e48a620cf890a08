"""The deterministic loop: repeatable, explorative, and never waiting."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from silo.testing.loop import Deadlock, SimulatedClock, SimulationError, explore, run_simulated
from silo.threads import run_to_completion


async def interleave(clock: SimulatedClock) -> tuple[str, str]:
    """Three workers that take turns; returns the order of their steps and the digest of the run."""
    steps: list[str] = []

    async def worker(name: str) -> None:
        for turn in range(3):
            steps.append(f"{name}{turn}")
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for name in "abc":
            group.create_task(worker(name))
    return " ".join(steps), clock.digest()


def test_same_seed_same_run():
    """One seed gives one run, however often and after whatever else it runs."""
    first = run_simulated(interleave, seed=7)
    run_simulated(interleave, seed=8)
    assert run_simulated(interleave, seed=7) == first


def test_different_seeds_interleave_differently():
    """Twenty seeds find nearly twenty of the many orders in which three workers can take turns."""
    assert len({order for order, _ in explore(interleave, seeds=range(20))}) > 15


def test_the_order_of_cancellation_does_not_depend_on_addresses():
    """A task group cancels a set of tasks, whose order differs from run to run; the trace does not."""

    async def scenario(clock: SimulatedClock) -> str:
        async def waits() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0)

        async def fails() -> None:
            await asyncio.sleep(1)
            raise ZeroDivisionError

        ballast.append([object() for _ in range(97 * len(ballast))])
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                for _ in range(20):
                    group.create_task(waits())
                group.create_task(fails())
        return clock.digest()

    ballast: list[list[object]] = []
    assert len({run_simulated(scenario, seed=3) for _ in range(10)}) == 1


def test_callbacks_keep_their_order():
    """asyncio promises that plain callbacks run in the order of their registration, and so does the loop."""

    async def scenario(clock: SimulatedClock) -> list[int]:
        ran: list[int] = []
        for number in range(50):
            asyncio.get_running_loop().call_soon(ran.append, number)
        await asyncio.sleep(1)
        return ran

    assert explore(scenario, seeds=range(10)) == [list(range(50))] * 10


def test_an_hour_costs_nothing():
    """Time jumps to the next timer: an hour's timeout passes in the blink of an eye, to the second."""

    async def scenario(clock: SimulatedClock) -> float:
        start = clock.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.Event().wait()
        return clock.monotonic() - start

    real = time.process_time()
    assert run_simulated(scenario, seed=0) == pytest.approx(3600)
    assert time.process_time() - real < 60


def test_timers_fire_in_order_and_cancelled_ones_never():
    """Timers run by their time; a cancelled one neither runs nor makes time pass."""

    async def scenario(clock: SimulatedClock) -> tuple[list[int], float]:
        loop, start, ran = asyncio.get_running_loop(), clock.monotonic(), []
        for delay in (3, 1, 2):
            loop.call_later(delay, ran.append, delay)
        loop.call_later(10, ran.append, 10).cancel()
        await asyncio.sleep(4)
        return ran, clock.monotonic() - start

    ran, elapsed = run_simulated(scenario, seed=1)
    assert ran == [1, 2, 3]
    assert elapsed == pytest.approx(4)


def test_deadlock_is_detected_and_named():
    """Two tasks that wait for each other end the run at once, and the error says who waits where."""

    async def crosswise(own: asyncio.Lock, other: asyncio.Lock) -> None:
        async with own:
            await asyncio.sleep(0.1)
            async with other:
                pass

    async def scenario(clock: SimulatedClock) -> None:
        left, right = asyncio.Lock(), asyncio.Lock()
        async with asyncio.TaskGroup() as group:
            group.create_task(crosswise(left, right), name="left-first")
            group.create_task(crosswise(right, left), name="right-first")

    with pytest.raises(Deadlock) as caught:
        run_simulated(scenario, seed=5)
    message = str(caught.value)
    assert "left-first waits in" in message
    assert "right-first waits in" in message
    assert "crosswise" in message
    assert f"{__file__}:" in message
    assert "seed 5" in "".join(caught.value.__notes__)


def test_running_in_circles_is_detected():
    """A task that polls for what never comes is stopped, since virtual time would never move on."""

    async def scenario(clock: SimulatedClock) -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Deadlock, match="in circles"):
        run_simulated(scenario, seed=0, rounds_max=1000)


def test_errors_carry_the_seed():
    """The first failing seed ends an exploration, and its error says how to see it again."""

    async def scenario(clock: SimulatedClock) -> None:
        if clock.seed == 13:
            raise ValueError("unlucky")

    with pytest.raises(ValueError, match="unlucky") as caught:
        explore(scenario, seeds=range(100))
    assert any("seed=13" in note for note in caught.value.__notes__)


def test_tasks_left_behind_fail_the_run():
    """A scenario that ends before its tasks do is an error, which names them."""

    async def scenario(clock: SimulatedClock) -> None:
        kept.append(asyncio.get_running_loop().create_task(asyncio.sleep(1), name="stray"))

    kept: list[asyncio.Task[None]] = []
    with pytest.raises(SimulationError, match="stray"):
        run_simulated(scenario, seed=0)
    assert kept[0].cancelled()


def test_cancellation_works():
    """A failing sibling cancels the others, whose clean-up runs; an outer timeout does the same."""

    async def scenario(clock: SimulatedClock) -> list[str]:
        log: list[str] = []

        async def waits(name: str) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                await asyncio.sleep(1)
                log.append(name)

        async def fails() -> None:
            await asyncio.sleep(5)
            raise ZeroDivisionError

        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(waits("sibling"))
                group.create_task(fails())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await waits("timed out")
        return log

    assert explore(scenario, seeds=range(20)) == [["sibling", "timed out"]] * 20


def test_clock_follows_virtual_time():
    """All three times advance together; the calendars of two hosts differ by their skew, and only they."""

    async def scenario(clock: SimulatedClock) -> None:
        other = SimulatedClock(clock.loop, wall_skew_s=30.0)
        before = (clock.monotonic(), clock.boottime(), clock.wall())
        await asyncio.sleep(60)
        after = (clock.monotonic(), clock.boottime(), clock.wall())
        assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([60, 60, 60])
        assert other.wall() - clock.wall() == pytest.approx(30)
        assert other.monotonic() == clock.monotonic() == asyncio.get_running_loop().time()

    explore(scenario, seeds=range(5))


def test_tokens_are_seeded():
    """Tokens have the length asked for, differ within a run and between seeds, and repeat with the seed."""

    async def scenario(clock: SimulatedClock) -> tuple[bytes, bytes]:
        return clock.token(16), clock.token(16)

    first, again, other = (run_simulated(scenario, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert len({*first, *other}) == 4
    assert {len(token) for token in (*first, *other)} == {16}


def test_a_call_in_an_executor_lies_between_other_steps():
    """Over many seeds a call happens before, between and after what another task does meanwhile."""

    async def scenario(clock: SimulatedClock) -> str:
        log: list[str] = []

        async def beside() -> None:
            for step in "12":
                await asyncio.sleep(clock.random.uniform(0, 0.02))
                log.append(step)

        async with asyncio.TaskGroup() as group:
            group.create_task(beside())
            await run_to_completion(None, log.append, "call")
            log.append("done")
        return " ".join(log)

    orders = set(explore(scenario, seeds=range(200)))
    assert {"call done 1 2", "call 1 done 2", "1 call done 2", "1 call 2 done", "1 2 call done"} <= orders
    assert not [order for order in orders if order.index("done") < order.index("call")]


def test_a_call_in_an_executor_returns_and_raises():
    """Results and errors come back as from a thread."""

    async def scenario(clock: SimulatedClock) -> int:
        with pytest.raises(ZeroDivisionError):
            await run_to_completion(None, divmod, 1, 0)
        return await run_to_completion(None, int, "12")

    assert explore(scenario, seeds=range(10)) == [12] * 10


def test_an_executor_with_one_worker_keeps_the_order():
    """One worker makes one call at a time, first come first served."""

    async def scenario(clock: SimulatedClock) -> list[int]:
        calls: list[int] = []
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(executor, calls.append, number) for number in range(10)]
        await asyncio.wait(futures)
        return calls

    with ThreadPoolExecutor(1) as executor:
        assert explore(scenario, seeds=range(20)) == [list(range(10))] * 20


def test_a_cancelled_call_may_still_happen():
    """Giving up on a thread does not stop it: the loop shows both outcomes, as threads do."""

    async def scenario(clock: SimulatedClock) -> bool:
        called: list[bool] = []
        future = asyncio.get_running_loop().run_in_executor(None, called.append, True)
        future.cancel()
        await asyncio.sleep(1)
        return bool(called)

    assert set(explore(scenario, seeds=range(30))) == {True, False}


@pytest.mark.sim
def test_a_cancelled_run_to_completion_changes_nothing_afterwards():
    """Whenever the cancellation strikes, the call has happened, or never will, before the caller goes on."""

    async def scenario(clock: SimulatedClock) -> tuple[bool, bool]:
        disk: list[str] = []

        async def writer() -> None:
            await run_to_completion(None, disk.append, "old")

        async with asyncio.TaskGroup() as group:
            task = group.create_task(writer())
            await asyncio.sleep(clock.random.uniform(0, 0.03))
            task.cancel()
            await asyncio.sleep(clock.random.choice((0, 0.001)))
            task.cancel()
            await asyncio.wait([task])
            seen = list(disk)
            await asyncio.sleep(1)
            assert disk == seen
        return task.cancelled(), bool(disk)

    outcomes = set(explore(scenario, seeds=range(300)))
    assert {(True, True), (False, True)} <= outcomes
