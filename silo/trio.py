"""Silo inside a trio program.

A `Portal` runs an asyncio loop in a thread of its own and carries calls, results, errors and cancellation across::

    async with silo.trio.Portal() as portal:
        async with portal.enter(silo.Host(state)) as host:
            group = await portal.run(host.open_group, "vm1", {"disk": device})
            async for event in portal.iterate(group.events()):
                ...

Cancellation travels both ways. When the trio caller is cancelled the asyncio task is cancelled and *waited
for*, so nothing of it is left; an overrun of a trio deadline therefore lasts as long as the task needs to
clean up. When a hook that was made with `hook` is cancelled on the asyncio side, its trio function is
cancelled and waited for in the same way.

Objects of Silo belong to the portal's loop: make them and call them only through the portal.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, TypeVarTuple

import outcome
import trio

from silo.errors import ClosedError

__all__ = ["Portal"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Portal:
    """See the module. Use as an async context manager in trio; one portal serves many trio tasks at once."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop
        self._token: trio.lowlevel.TrioToken
        self._nursery: trio.Nursery
        self._thread: threading.Thread
        self._managers: list[AbstractAsyncContextManager[Any]] = []

    async def __aenter__(self) -> Self:
        self._token = trio.lowlevel.current_trio_token()
        started = threading.Event()

        def run() -> None:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                self._loop.call_soon(started.set)
                self._loop.run_forever()

        self._thread = threading.Thread(target=run, name="silo-portal", daemon=True)
        self._thread.start()
        await trio.to_thread.run_sync(started.wait)
        manager = trio.open_nursery()
        self._nursery = await manager.__aenter__()
        self._managers.append(manager)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._nursery.cancel_scope.cancel()
        try:
            await self._managers.pop().__aexit__(kind, error, trace)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._thread.join)

    async def run(self, call: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Await ``call(*args)`` on the asyncio side. Concurrent calls are allowed."""
        trio_task = trio.lowlevel.current_task()
        asyncio_task: asyncio.Task[T] | None = None
        raise_cancel: Callable[[], Any] | None = None
        cancel_wanted = False

        async def work() -> T:
            return await call(*args)

        def start() -> None:
            nonlocal asyncio_task
            asyncio_task = self._loop.create_task(work())
            asyncio_task.add_done_callback(finish)
            if cancel_wanted:
                asyncio_task.cancel()

        def finish(task: asyncio.Task[T]) -> None:
            result: outcome.Outcome[T]
            if task.cancelled():
                result = outcome.Error(ClosedError("the call was cancelled on the asyncio side"))
            elif (error := task.exception()) is not None:
                result = outcome.Error(error)
            else:
                result = outcome.Value(task.result())
            self._token.run_sync_soon(wake, result)

        def wake(result: outcome.Outcome[T]) -> None:
            cancelled = isinstance(result, outcome.Error) and isinstance(result.error, ClosedError)
            if raise_cancel is not None and cancelled:
                result = outcome.capture(raise_cancel)
            trio.lowlevel.reschedule(trio_task, result)

        def abort(raise_it: Callable[[], Any]) -> trio.lowlevel.Abort:
            nonlocal raise_cancel, cancel_wanted
            raise_cancel, cancel_wanted = raise_it, True
            self._loop.call_soon_threadsafe(lambda: asyncio_task is not None and asyncio_task.cancel())
            return trio.lowlevel.Abort.FAILED  # the result comes when the task has really ended

        self._loop.call_soon_threadsafe(start)
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    @asynccontextmanager
    async def enter(self, manager: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
        """An asyncio context manager as one of trio. Leaving is not cut short by a cancellation."""
        value = await self.run(manager.__aenter__)
        try:
            yield value
        except BaseException as error:
            with trio.CancelScope(shield=True):
                if not await self.run(manager.__aexit__, type(error), error, error.__traceback__):
                    raise
        else:
            with trio.CancelScope(shield=True):
                await self.run(manager.__aexit__, None, None, None)

    async def iterate(self, items: AsyncIterator[T]) -> AsyncIterator[T]:
        """An asyncio iterator as one of trio."""
        while True:
            try:
                item = await self.run(items.__anext__)
            except StopAsyncIteration:
                return
            yield item

    def hook(self, call: Callable[[*Ts], Awaitable[T]]) -> Callable[[*Ts], Awaitable[T]]:
        """A trio function as one that asyncio code, such as a `silo.Workload`, can await."""

        async def from_asyncio(*args: *Ts) -> T:
            future: asyncio.Future[T] = self._loop.create_future()
            scope = trio.CancelScope()

            async def in_trio() -> None:
                result: outcome.Outcome[T]
                with scope:
                    result = await outcome.acapture(call, *args)
                if scope.cancelled_caught:
                    result = outcome.Error(ClosedError("the hook was cancelled on the trio side"))
                self._loop.call_soon_threadsafe(settle, result)

            def settle(result: outcome.Outcome[T]) -> None:
                if isinstance(result, outcome.Error):
                    future.set_exception(result.error)
                elif isinstance(result, outcome.Value):
                    future.set_result(result.value)

            self._token.run_sync_soon(self._nursery.start_soon, in_trio)
            cancelled: asyncio.CancelledError | None = None
            while not future.done():
                try:
                    await asyncio.wait((future,))
                except asyncio.CancelledError as error:
                    cancelled = error
                    self._token.run_sync_soon(scope.cancel)
            if cancelled is not None:
                future.exception()
                raise cancelled
            return future.result()

        return from_asyncio
