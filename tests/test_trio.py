"""A trio program that embeds Silo: results, errors and cancellation cross in both directions."""

from __future__ import annotations

import asyncio

import pytest
import trio

from silo.errors import CapacityError
from silo.trio import Portal


@pytest.mark.trio
async def test_results_errors_and_iterators_cross() -> None:
    """A call brings back what it returns, raises what it raises, and an iterator gives all its items."""

    async def double(value: int) -> int:
        await asyncio.sleep(0)
        return 2 * value

    async def fail() -> None:
        raise CapacityError("full")

    async def count():
        for number in range(3):
            yield number

    async with Portal() as portal:
        assert await portal.run(double, 21) == 42
        with pytest.raises(CapacityError):
            await portal.run(fail)
        assert [number async for number in portal.iterate(count())] == [0, 1, 2]


@pytest.mark.trio
async def test_cancelling_in_trio_ends_the_asyncio_task_first() -> None:
    """When the trio caller goes on after a cancellation, nothing of the asyncio task is left."""
    ended = []

    async def linger(started: trio.Event, token: trio.lowlevel.TrioToken) -> None:
        token.run_sync_soon(started.set)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    async with Portal() as portal:
        started = trio.Event()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(portal.run, linger, started, trio.lowlevel.current_trio_token())
                await started.wait()
                scope.cancel()
        assert ended == ["cleaned up"]


@pytest.mark.trio
async def test_cancelling_in_asyncio_ends_the_trio_hook_first() -> None:
    """A hook in trio is cancelled, and has ended, when the asyncio side goes on."""
    ended = []

    async def hook(value: int) -> int:
        if value < 0:
            try:
                await trio.sleep_forever()
            finally:
                ended.append("cleaned up")
        return value + 1

    async def call(hooked) -> int:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await hooked(-1)
        assert ended == ["cleaned up"]
        return await hooked(41)

    async with Portal() as portal:
        assert await portal.run(call, portal.hook(hook)) == 42
