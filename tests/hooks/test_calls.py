"""One hook: awaited or in a thread, failing, overdue, cancelled, and never two at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import NoReturn

import attrs
import pytest

from silo.clock import SystemClock
from silo.errors import CapacityError, UnavailableError
from silo.hooks.calls import HookCalls
from silo.testing.loop import SimulatedClock, explore, run_simulated

WAIT_S = 30.0
SOON_S = 0.02
"""A deadline for hooks that are held back until it has passed."""


@attrs.define
class HeldHook:
    """A plain hook that runs until the test lets it go."""

    started: threading.Event = attrs.field(factory=threading.Event)
    released: threading.Event = attrs.field(factory=threading.Event)
    ended: threading.Event = attrs.field(factory=threading.Event)
    error: Exception | None = None

    def __call__(self) -> str:
        self.started.set()
        assert self.released.wait(WAIT_S)
        self.ended.set()
        if self.error is not None:
            raise self.error
        return "done"


@pytest.fixture
def held() -> Iterator[HeldHook]:
    hook = HeldHook()
    yield hook
    hook.released.set()


@pytest.fixture
def calls(clock: SystemClock) -> HookCalls:
    return HookCalls("the workload of vm1", clock)


async def turns(count: int = 10) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until_set(event: threading.Event) -> None:
    """Wait for something that a thread does."""
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(None, event.wait, WAIT_S)


async def test_an_awaited_hook_runs_on_the_loop_and_a_plain_one_does_not(calls, clock):
    """Both get their arguments, and their results come back."""
    threads = []

    async def awaited(word: str) -> str:
        threads.append(threading.current_thread())
        return word

    def plain(word: str) -> str:
        threads.append(threading.current_thread())
        return word

    later = clock.monotonic() + WAIT_S
    assert await calls.call("hook a", later, awaited, "one") == "one"
    assert await calls.call("hook b", later, plain, "two") == "two"
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()
    assert threads[1].daemon, "a hook that hangs must not keep the process alive"


async def test_a_plain_function_may_return_an_awaitable(calls, clock):
    """As decorators make of an ``async def``: the awaitable is awaited on the loop."""
    ran_on = []

    async def inner() -> str:
        ran_on.append(threading.current_thread())
        return "done"

    assert await calls.call("hook a", clock.monotonic() + WAIT_S, lambda: inner()) == "done"
    assert ran_on == [threading.main_thread()]


async def raise_awaited(error: BaseException) -> NoReturn:
    raise error


def raise_plain(error: BaseException) -> NoReturn:
    raise error


@pytest.mark.parametrize("hook", [raise_awaited, raise_plain])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such machine"), "no such machine"),
        (ValueError(), "ValueError"),
        (CapacityError("the disk is full", hint="buy another"), r"the disk is full \(buy another\)"),
        (TimeoutError("the monitor did not answer"), "the monitor did not answer"),
        (SystemExit(3), "3"),
        (StopIteration(), "StopIteration"),
        (asyncio.CancelledError(), "CancelledError"),
    ],
    ids=repr,
)
async def test_whatever_a_hook_raises_names_the_hook(calls, clock, hook, error, message):
    """Every error becomes one class, with the name of the hook, that of its owner and the original words."""
    with pytest.raises(
        UnavailableError, match=rf"hook suspend of the workload of vm1 failed: .*{message}"
    ) as caught:
        await calls.call("hook suspend", clock.monotonic() + WAIT_S, hook, error)
    assert caught.value.__cause__ is not None
    assert await calls.call("hook resume", clock.monotonic() + WAIT_S, str) == "", "the next one has its turn"


def test_an_overdue_awaited_hook_is_cancelled_and_waited_for():
    """It ends before its caller goes on, not long after the deadline."""

    async def scenario(clock: SimulatedClock) -> None:
        ended_at = []

        async def slow() -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await asyncio.sleep(0.5)
                ended_at.append(clock.monotonic())

        deadline = clock.monotonic() + 10
        calls = HookCalls("the workload of vm1", clock)
        with pytest.raises(
            UnavailableError, match="hook flush of the workload of vm1 was not done by its deadline"
        ):
            await calls.call("hook flush", deadline, slow)
        assert ended_at == [clock.monotonic()] == [deadline + 0.5]

    explore(scenario, seeds=range(5))


def test_an_answer_after_the_deadline_does_not_count():
    """Also when the hook ignores the cancellation and returns something."""

    async def scenario(clock: SimulatedClock) -> None:
        async def stubborn() -> str:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                return "late"
            raise AssertionError

        with pytest.raises(UnavailableError, match="not done by its deadline"):
            await HookCalls("it", clock).call("hook flush", clock.monotonic() + 1, stubborn)

    run_simulated(scenario, seed=1)


@pytest.mark.parametrize("kind", ["awaited", "plain"])
async def test_after_the_deadline_a_hook_is_not_even_called(calls, clock, kind):
    """Starting what cannot be done in time would only have to be undone."""
    called = []

    async def awaited() -> None:
        called.append("awaited")

    def plain() -> None:
        called.append("plain")

    with pytest.raises(UnavailableError, match="not done by its deadline"):
        await calls.call("hook suspend", clock.monotonic() - 1, awaited if kind == "awaited" else plain)
    assert called == []


async def test_an_overdue_plain_hook_is_abandoned(calls, clock, held, expect_log):
    """The caller goes on; the hook goes on too, and its late end is only noted."""
    expect_log("hook suspend of the workload of vm1 ended long after its deadline")
    with pytest.raises(UnavailableError, match=r"hook suspend .* was not done by its deadline"):
        await calls.call("hook suspend", clock.monotonic() + SOON_S, held)
    assert not held.ended.is_set()
    held.released.set()
    assert await calls.call("hook unsuspend", clock.monotonic() + WAIT_S, str) == ""
    assert held.ended.is_set()


async def test_a_late_failure_is_noted_too(calls, clock, held, expect_log):
    """An abandoned hook's error is in the log, since nobody else can have it."""
    expect_log(r"hook suspend .* failed \(ValueError\('too late'\)\) long after its deadline")
    held.error = ValueError("too late")
    with pytest.raises(UnavailableError, match="not done by its deadline"):
        await calls.call("hook suspend", clock.monotonic() + SOON_S, held)
    held.released.set()
    assert await calls.call("hook unsuspend", clock.monotonic() + WAIT_S, str) == ""


async def test_an_awaitable_that_comes_too_late_is_never_awaited(calls, clock, held, expect_log):
    """It is closed, so that nothing of it runs."""
    expect_log("ended long after its deadline")
    ran = []

    async def inner() -> None:
        ran.append("inner")

    def plain() -> object:
        held()
        return inner()

    with pytest.raises(UnavailableError, match="not done by its deadline"):
        await calls.call("hook suspend", clock.monotonic() + SOON_S, plain)
    held.released.set()
    assert await calls.call("hook unsuspend", clock.monotonic() + WAIT_S, str) == ""
    assert ran == []


async def test_two_hooks_never_run_at_once(calls, clock, held, expect_log):
    """While an abandoned hook runs, the next is refused by its own deadline, and the error names the culprit."""
    expect_log("hook suspend of the workload of vm1 ended long after its deadline")
    called = []
    with pytest.raises(UnavailableError, match="not done by its deadline"):
        await calls.call("hook suspend", clock.monotonic() + SOON_S, held)
    for _ in range(2):
        with pytest.raises(
            UnavailableError,
            match="hook unsuspend of the workload of vm1 was not called, because hook suspend is still running",
        ):
            await calls.call("hook unsuspend", clock.monotonic() + SOON_S, called.append, "too early")
    assert called == []
    held.released.set()
    await calls.call("hook unsuspend", clock.monotonic() + WAIT_S, called.append, "in turn")
    assert called == ["in turn"]


async def test_everybody_who_waits_for_an_abandoned_hook_hears_its_name(calls, clock, held, expect_log):
    """Not only the one whose turn it would be."""
    expect_log("hook suspend of the workload of vm1 ended long after its deadline")
    with pytest.raises(UnavailableError, match="not done by its deadline"):
        await calls.call("hook suspend", clock.monotonic() + SOON_S, held)
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(calls.call("hook unsuspend", clock.monotonic() + WAIT_S, str))
        await turns()
        with pytest.raises(UnavailableError, match=r"hook probe .* because hook suspend is still running"):
            await calls.call("hook probe", clock.monotonic() + SOON_S, str)
        held.released.set()
    assert first.result() == ""


def test_callers_take_turns():
    """Concurrent calls run one after the other, in the order in which they came."""

    async def scenario(clock: SimulatedClock) -> None:
        calls = HookCalls("it", clock)
        running: list[int] = []
        order: list[int] = []

        async def hook(number: int) -> None:
            running.append(number)
            await asyncio.sleep(1)
            assert running == [number]
            running.clear()
            order.append(number)

        deadline = clock.monotonic() + 100
        async with asyncio.TaskGroup() as tasks:
            for number in range(5):
                tasks.create_task(calls.call(f"hook {number}", deadline, hook, number))
        assert sorted(order) == list(range(5))

    explore(scenario, seeds=range(10))


def test_a_turn_that_does_not_come_is_refused():
    """Whoever waits for a slow hook waits only until the own deadline, and takes nothing with it."""

    async def scenario(clock: SimulatedClock) -> None:
        calls = HookCalls("it", clock)
        started = asyncio.Event()

        async def slow() -> None:
            started.set()
            await asyncio.sleep(10)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(calls.call("hook flush", clock.monotonic() + 20, slow))
            await started.wait()
            with pytest.raises(UnavailableError, match="hook probe of it was not called, because hook flush"):
                await calls.call("hook probe", clock.monotonic() + 1, str)
        assert await calls.call("hook probe", clock.monotonic() + 1, str) == ""

    explore(scenario, seeds=range(10))


def test_a_cancelled_caller_leaves_no_awaited_hook_behind():
    """The hook is cancelled, its clean-up is waited for, and then the cancellation goes on."""

    async def scenario(clock: SimulatedClock) -> None:
        calls = HookCalls("it", clock)
        events: list[str] = []
        started = asyncio.Event()

        async def hook() -> None:
            started.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await asyncio.sleep(0.1)
                events.append("hook ended")

        async def caller() -> None:
            try:
                await calls.call("hook suspend", clock.monotonic() + 100, hook)
            finally:
                events.append("caller ended")

        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(caller())
            await started.wait()
            task.cancel()
        assert task.cancelled()
        assert events == ["hook ended", "caller ended"]

    explore(scenario, seeds=range(10))


def test_a_hook_cannot_eat_the_cancellation_of_its_caller():
    """A hook that catches everything still does not keep its caller running."""

    async def scenario(clock: SimulatedClock) -> None:
        calls = HookCalls("it", clock)
        started = asyncio.Event()

        async def greedy() -> str:
            started.set()
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                return "what cancellation?"
            raise AssertionError

        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(calls.call("hook suspend", clock.monotonic() + 100, greedy))
            await started.wait()
            task.cancel()
        assert task.cancelled()

    run_simulated(scenario, seed=1)


async def test_a_cancelled_caller_waits_for_a_plain_hook(calls, clock, held):
    """A thread cannot be cancelled; while there is time it is waited for."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(calls.call("hook suspend", clock.monotonic() + WAIT_S, held))
        await until_set(held.started)
        task.cancel()
        await turns()
        assert not task.done()
        held.released.set()
    assert task.cancelled()
    assert held.ended.is_set()


async def test_a_cancelled_caller_abandons_a_plain_hook_at_its_deadline(calls, clock, held, expect_log):
    """It waits no longer than anybody would have."""
    expect_log("ended long after its deadline")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(calls.call("hook suspend", clock.monotonic() + SOON_S, held))
        await until_set(held.started)
        task.cancel()
        await asyncio.wait((task,))
    assert task.cancelled()
    assert not held.ended.is_set()
    held.released.set()
    assert await calls.call("hook unsuspend", clock.monotonic() + WAIT_S, str) == ""


async def test_a_cancelled_caller_drops_what_a_plain_hook_returns(calls, clock, held):
    """Be it an awaitable: nothing of it runs."""
    ran = []

    async def inner() -> None:
        ran.append("inner")

    def plain() -> object:
        held()
        return inner()

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(calls.call("hook suspend", clock.monotonic() + WAIT_S, plain))
        await until_set(held.started)
        task.cancel()
        held.released.set()
    assert task.cancelled()
    assert ran == []


async def test_a_cancelled_caller_in_the_queue_takes_no_turn(calls, clock, held):
    """Cancelled while it waits for its turn, it calls nothing."""
    called = []
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(calls.call("hook flush", clock.monotonic() + WAIT_S, held))
        await until_set(held.started)
        second = tasks.create_task(calls.call("hook probe", clock.monotonic() + WAIT_S, called.append, 1))
        await turns()
        second.cancel()
        await asyncio.wait((second,))
        held.released.set()
    assert (first.result(), second.cancelled(), called) == ("done", True, [])
