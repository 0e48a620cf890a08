"""Calling one hook: awaited or in a thread, until a deadline, and never two at once.

A hook is code of the embedder, and all that is known of it is what it promised: to be done by a deadline. What
happens when it is not depends on its kind.

* An ``async def`` hook is cancelled, and waited for. It must therefore end soon after a cancellation, as any
  coroutine must; one that refuses to holds up the migration.
* A plain function runs in a thread of its own, and Python cannot stop a thread. When it is overdue it is
  *abandoned*: its caller gets an error, and its result no longer counts, but nobody assumes that it stopped.
  The next hook of the same workload waits for its end within its own deadline, or is refused with an error that
  names the culprit, so that a late "suspend" can never overtake the "unsuspend" that was to undo it. The
  threads are daemons: one that never ends does not keep the process from exiting.

A cancelled caller leaves nothing behind: an awaited hook is cancelled and waited for, and a plain one is waited
for as long as its deadline allows, and abandoned only then.

Whatever goes wrong becomes `UnavailableError`, since what the hook has done is then unknown, and since it may be
called again: hooks are idempotent.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from typing import Any

import attrs

from silo.abc import Clock
from silo.errors import SiloError, UnavailableError

__all__ = ["HookCalls"]

log = logging.getLogger(__name__)


class DaemonThreads(Executor):
    """A daemon thread per call. Calls are rare here, and one that hangs must not hold up the end of the process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                # What means something else to an event loop must arrive there as an ordinary failure.
                special = isinstance(error, StopIteration) or not isinstance(error, Exception)
                future.set_exception(RuntimeError(f"it raised {error!r}") if special else error)
            else:
                future.set_result(result)

        threading.Thread(target=run, name="silo-hook", daemon=True).start()
        return future


@attrs.frozen
class Abandoned:
    """A plain hook that was overdue, and may still be running."""

    name: str
    future: asyncio.Future[Any]


class HookCalls:
    """The hooks of one workload (or one observer), one at a time. Belongs to one event loop; needs no closing."""

    def __init__(self, owner: str, clock: Clock) -> None:
        self.owner = owner
        """Whose hooks these are, for messages: ``the workload of vm1``."""
        self._clock = clock
        self._turn = asyncio.Lock()
        self._running = ""
        self._abandoned: Abandoned | None = None
        self._threads = DaemonThreads()

    async def call(self, name: str, deadline: float, hook: Callable[..., Any], *args: Any) -> Any:
        """Call the hook and return what it returns, or what that awaitable gives.

        ``name`` is for messages: ``hook suspend``. ``deadline`` is `Clock.monotonic` time, and finite; when it is
        past, the hook is not called at all. Concurrent calls take turns. Raises `UnavailableError` when the hook
        failed or was overdue, or when its turn did not come. See the module for what a cancellation does.
        """
        await self._take_turn(name, deadline)
        try:
            self._running = name
            if not inspect.iscoroutinefunction(hook):
                result = await self._call_in_thread(name, deadline, hook, args)
                if not inspect.isawaitable(result):
                    return result
            else:
                result = hook(*args)
            return await self._call_on_loop(name, deadline, result)
        finally:
            self._running = ""
            self._turn.release()

    async def _take_turn(self, name: str, deadline: float) -> None:
        """Return with the turn taken, and nothing of the workload running."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn.acquire()
        except TimeoutError:
            culprit = self._abandoned.name if self._abandoned else self._running
            raise self._refusal(name, culprit) from None
        try:
            if self._abandoned is not None:
                await asyncio.wait((self._abandoned.future,), timeout=self._left_s(deadline))
                if not self._abandoned.future.done():
                    raise self._refusal(name, self._abandoned.name)
                self._abandoned = None
            if not self._left_s(deadline):
                raise self._overdue(name)
        except BaseException:
            self._turn.release()
            raise

    async def _call_on_loop(self, name: str, deadline: float, awaitable: Awaitable[Any]) -> Any:
        caller = asyncio.current_task()
        cancels = caller.cancelling() if caller else 0
        patience = asyncio.timeout_at(deadline)
        try:
            async with patience:
                result = await awaitable
        except TimeoutError as error:
            raise (self._overdue(name) if patience.expired() else self._failure(name, error)) from error
        except (Exception, SystemExit) as error:
            raise self._failure(name, error) from error
        except asyncio.CancelledError as error:
            if caller and caller.cancelling() > cancels:
                raise
            raise self._failure(name, error) from error  # it cancelled itself, which is nothing to us
        if caller and caller.cancelling() > cancels:
            raise asyncio.CancelledError  # it ate our cancellation
        if patience.expired():
            raise self._overdue(name)
        return result

    async def _call_in_thread(
        self, name: str, deadline: float, hook: Callable[..., Any], args: tuple[Any, ...]
    ) -> Any:
        future = asyncio.get_running_loop().run_in_executor(self._threads, hook, *args)
        cancelled: asyncio.CancelledError | None = None
        while not future.done() and (left_s := self._left_s(deadline)):
            try:
                await asyncio.wait((future,), timeout=left_s)
            except asyncio.CancelledError as error:
                cancelled = error
        if not future.done():
            self._abandoned = Abandoned(name, future)
            future.add_done_callback(lambda ended: self._note_late_end(name, ended))
            raise cancelled or self._overdue(name)
        if cancelled is not None:
            _drop(future)
            raise cancelled
        try:
            return future.result()
        except Exception as error:
            raise self._failure(name, error) from error

    def _note_late_end(self, name: str, ended: asyncio.Future[Any]) -> None:
        error = _drop(ended)
        outcome = "ended" if error is None else f"failed ({error!r})"
        log.warning("%s of %s %s long after its deadline", name, self.owner, outcome)

    def _left_s(self, deadline: float) -> float:
        return max(0.0, deadline - self._clock.monotonic())

    def _overdue(self, name: str) -> UnavailableError:
        return UnavailableError(
            f"{name} of {self.owner} was not done by its deadline",
            hint="make it faster, or allow it more time",
        )

    def _refusal(self, name: str, culprit: str) -> UnavailableError:
        return UnavailableError(
            f"{name} of {self.owner} was not called, because {culprit} is still running",
            hint=f"find out why {culprit} does not end: two hooks never run at once",
        )

    def _failure(self, name: str, error: BaseException) -> UnavailableError:
        message = error.message if isinstance(error, SiloError) else str(error) or type(error).__name__
        hint = error.hint if isinstance(error, SiloError) else ""
        return UnavailableError(f"{name} of {self.owner} failed: {message}", hint=hint)


def _drop(future: asyncio.Future[Any]) -> BaseException | None:
    """Forget what a call came to, and return its error, if it has one."""
    if (error := future.exception()) is None and inspect.iscoroutine(result := future.result()):
        result.close()
    return error
