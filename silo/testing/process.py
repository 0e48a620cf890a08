"""Processes that can be killed, on the deterministic loop of `silo.testing.loop`.

A `SimulatedProcess` runs a coroutine and everything that it starts (tasks, timers, calls in executors) as if in
a process of its own. `SimulatedProcess.kill` stops all of it between two steps and for ever: nothing is
cancelled, no ``finally`` runs, a call in an executor that has not happened never does. What the process has
done to a simulated disk, store or network stays. ``kill_after`` does so after a number of steps; a scenario
that is run with every number has crashed at every await::

    async def scenario(clock):
        disk = Disk()
        async with SimulatedProcess(serve(disk), kill_after=steps) as process:
            await process.wait_ended()
        check(disk)

A process may share only what outlives it with the rest of the scenario: a lock that a dead process holds
stays held. What shall go on after its death, like a message on its way, is started in a context of its own:
``loop.call_later(..., context=contextvars.Context())``. The coroutines of the dead are unwound after the
scenario has ended, when nobody looks any more.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from silo.testing.loop import SimulatedLoop, owner

__all__ = ["SimulatedProcess"]


class SimulatedProcess:
    """A coroutine with all that it starts. Entering starts it; leaving cancels it and waits, unless it is dead.

    An error of the coroutine is raised by `wait_ended` and on leaving.
    """

    def __init__(
        self, main: Coroutine[Any, Any, object], *, name: str = "process", kill_after: int | None = None
    ) -> None:
        self.name = name
        self.steps = 0
        """How many steps of tasks and callbacks it has run."""
        self.killed = False
        self._main = main
        self._kill_after = kill_after
        self._task: asyncio.Task[object] | None = None
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, SimulatedLoop):
            raise TypeError("a SimulatedProcess needs the loop of run_simulated")
        context = contextvars.copy_context()
        context.run(owner.set, self)
        self._task = loop.create_task(self._main, name=self.name, context=context)
        self._task.add_done_callback(lambda _: self._ended.set())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None and not self._ended.is_set():
            self._task.cancel()
        await self.wait_ended()

    async def wait_ended(self) -> None:
        """Wait until the coroutine has ended or the process was killed; raises the coroutine's error, if any.

        Cancellation leaves the process running. Concurrent calls are allowed.
        """
        await self._ended.wait()
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    def kill(self) -> None:
        """Nothing of the process runs any more. When called from inside, the current step still ends."""
        self.killed = True
        self._ended.set()

    def lives_on(self) -> bool:
        """Asked by the loop before each step: count it, unless it comes too late."""
        if self.steps == self._kill_after:
            self.kill()
        if self.killed:
            return False
        self.steps += 1
        return True
