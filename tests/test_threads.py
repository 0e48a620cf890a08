"""Blocking calls end before their caller goes on, whatever happens to the caller."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from silo.threads import run_to_completion

WAIT_S = 30


class BlockingCall:
    """A call that a test can hold back: it announces its start and ends when it is let go."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.released = threading.Event()
        self.ended = False

    def __call__(self, error: Exception | None = None) -> str:
        self.started.set()
        assert self.released.wait(WAIT_S)
        self.ended = True
        if error is not None:
            raise error
        return "result"


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


async def started(executor: ThreadPoolExecutor, call: BlockingCall) -> None:
    assert await asyncio.get_running_loop().run_in_executor(executor, call.started.wait, WAIT_S)


async def turns(count: int = 10) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_returns_what_the_call_returns():
    """Arguments go in, the result comes out; without an executor the loop's own serves."""
    assert await run_to_completion(None, divmod, 17, 5) == (3, 2)


async def test_runs_in_the_given_executor():
    """The call runs in a thread of that executor, not in the loop's."""
    with ThreadPoolExecutor(1, thread_name_prefix="mine") as executor:
        thread = await run_to_completion(executor, threading.current_thread)
    assert thread.name.startswith("mine")


async def test_raises_what_the_call_raises():
    """The call's own exception object arrives."""
    error = OSError(28, "No space left on device")

    def call() -> None:
        raise error

    with pytest.raises(OSError, match="No space left") as caught:
        await run_to_completion(None, call)
    assert caught.value is error


async def test_the_loop_goes_on_meanwhile(executor):
    """Other tasks run while the call blocks."""
    call = BlockingCall()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run_to_completion(executor, call))
        await started(executor, call)
        assert not task.done()
        call.released.set()
    assert task.result() == "result"


@pytest.mark.parametrize("cancellations", [1, 3])
async def test_cancellation_waits_for_the_thread(executor, cancellations):
    """However often it is cancelled, it ends only after its thread, and then as cancelled."""
    call = BlockingCall()
    task = asyncio.get_running_loop().create_task(run_to_completion(executor, call))
    await started(executor, call)
    for _ in range(cancellations):
        task.cancel()
        await turns()
        assert not task.done()
    call.released.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert call.ended


async def test_an_error_after_a_cancellation_is_dropped(executor):
    """The cancelled caller gets its cancellation; the error of a call that nobody waits for is not logged."""
    call = BlockingCall()
    task = asyncio.get_running_loop().create_task(run_to_completion(executor, call, ValueError()))
    await started(executor, call)
    task.cancel()
    await turns()
    call.released.set()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_timeout_is_late_rather_than_wrong(executor):
    """An expired deadline turns into TimeoutError once the thread has ended."""
    call = BlockingCall()

    async def with_timeout() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await run_to_completion(executor, call)
        assert call.ended

    async with asyncio.TaskGroup() as group:
        task = group.create_task(with_timeout())
        await started(executor, call)
        await turns()
        assert not task.done()
        call.released.set()
