"""A task group whose failure is one error, and whose caller still hears when it was cancelled itself."""

from __future__ import annotations

import asyncio

import pytest

from silo.errors import UnavailableError
from silo.tasks import task_group


async def fail_when(event: asyncio.Event) -> None:
    await event.wait()
    raise UnavailableError("away")


@pytest.mark.parametrize("where", ["in the block", "at its end", "without a wait between"])
async def test_the_first_error_is_raised_and_the_caller_lives_on(where: str) -> None:
    """Wherever the caller is when a task fails, it gets the error, and no cancellation is left behind."""
    event = asyncio.Event()
    with pytest.raises(UnavailableError):
        async with task_group() as tasks:
            tasks.create_task(fail_when(event))
            if where != "at its end":
                event.set()
            else:
                asyncio.get_running_loop().call_later(0.01, event.set)
            if where == "in the block":
                await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_a_group_in_a_group() -> None:
    event = asyncio.Event()
    with pytest.raises(UnavailableError):
        async with task_group() as outer:
            outer.create_task(asyncio.sleep(100))
            async with task_group() as inner:
                inner.create_task(fail_when(event))
                event.set()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_an_error_of_the_block_itself() -> None:
    with pytest.raises(UnavailableError):
        async with task_group() as tasks:
            tasks.create_task(asyncio.sleep(100))
            raise UnavailableError("away")


@pytest.mark.parametrize("fails_too", [False, True])
async def test_a_cancelled_caller_is_cancelled(fails_too: bool) -> None:
    """Even when a task fails at the very moment."""
    event = asyncio.Event()

    async def call() -> None:
        async with task_group() as tasks:
            tasks.create_task(fail_when(event))

    async with asyncio.TaskGroup() as tasks:
        called = tasks.create_task(call())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if fails_too:
            event.set()
            await asyncio.sleep(0)
        called.cancel()
        await asyncio.wait((called,))
        assert called.cancelled()


async def test_a_deadline_around_it_ends_as_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            async with task_group() as tasks:
                tasks.create_task(asyncio.sleep(100))
