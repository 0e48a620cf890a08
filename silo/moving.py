"""One migration as the program that asked for it sees it: a `Move`.

::

    async with group.migrate("tcp:hostb:5170") as move:
        async for event in move.events(): ...
        report = await move.wait_released()

The migration itself is a task of the host, not of whoever asked: past the handover it must not end because a caller
went away. Leaving the block waits for the end. Leaving it by an exception, a cancellation among them, aborts the
migration while that is still possible; past the handover it goes on, and the host waits for it when it is left.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self

from silo.abc import Clock
from silo.errors import MigrationAborted, SiloError
from silo.events import MigrationEvent, MigrationReport, Phase, PhaseEntered, Progress
from silo.hooks.observers import Observer, Observers

__all__ = ["EventLog", "Move"]

UNDOABLE = frozenset({None, Phase.CONNECTING, Phase.PRE_COPY, Phase.FOLLOWING, Phase.STORING})


class EventLog:
    """The events of one migration, for any number of readers.

    A reader gets every event from the first one on, but of a run of `Progress` that it has not read only the last;
    one that comes late does not get old progress at all.
    """

    def __init__(self, group: str, clock: Clock, observers: Sequence[Observer] = ()) -> None:
        self.phase: Phase | None = None
        self._observers = Observers(observers, clock, group=group)
        self._history: list[MigrationEvent] = []
        self._readers: list[deque[MigrationEvent]] = []
        self._more = asyncio.Event()
        self._ended = False
        self._last: PhaseEntered | None = None
        self.has_objections = False
        """An observer, or whoever asked for the migration, does not want it any more."""
        self._abort: MigrationAborted | None = None

    def emit(self, event: MigrationEvent) -> None:
        """Take an event, as ``silo.p2p.ports.Emit``. The one that says that it has ended is kept back until `end`,
        because a migration may yet go on to the store."""
        if isinstance(event, PhaseEntered) and event.phase is Phase.ENDED:
            self._last, self.phase = event, event.phase  # there is nothing left that could be aborted
            return
        self._keep(event)
        self._observers.emit(event)

    def _keep(self, event: MigrationEvent) -> None:
        if isinstance(event, PhaseEntered):
            self.phase = event.phase
        if not isinstance(event, Progress):
            self._history.append(event)
        for waiting in self._readers:
            if isinstance(event, Progress) and waiting and isinstance(waiting[-1], Progress):
                waiting.pop()
            waiting.append(event)
        self._wake()

    async def consent(self, event: MigrationEvent) -> None:
        """Ask the observers, as ``silo.p2p.ports.Consent``; they are told of the event by that."""
        self.raise_objection()
        self._keep(event)
        try:
            await self._observers.consent(event)
        except SiloError:
            self.has_objections = True
            raise

    def raise_objection(self) -> None:
        """Raise what `object` was given, if it was."""
        if self._abort is not None:
            raise self._abort

    def object(self, error: MigrationAborted) -> None:
        """Raise this at the next question."""
        self._abort = error
        self.has_objections = True

    async def deliver(self) -> None:
        """Bring events to the observers until cancelled."""
        await self._observers.run()

    async def end(self) -> None:
        """There will be no more events; the observers get what they have not seen."""
        if self._last is not None:
            self._keep(self._last)
            self._observers.emit(self._last)
        self._ended = True
        self._wake()
        await self._observers.drain()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    async def read(self) -> AsyncIterator[MigrationEvent]:
        """Events until the end. No deadline: a migration says by itself that it is alive."""
        waiting = deque(self._history)
        self._readers.append(waiting)
        try:
            while True:
                while waiting:
                    yield waiting.popleft()
                if self._ended:
                    return
                await self._more.wait()
        finally:
            self._readers.remove(waiting)


class Move:
    """See the module. Made by `silo.hosted.HostedGroup.migrate`; `report` is final after `wait_released`."""

    def __init__(
        self,
        log: EventLog,
        run: Callable[[], Coroutine[Any, Any, MigrationReport]],
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        switch: Callable[[float | None], None] = lambda deadline: None,
    ) -> None:
        self._switch = switch
        self._log = log
        self._run = run
        self._start = start
        self._task: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._report: MigrationReport | None = None
        self._error: SiloError | None = None
        self._is_undone = False
        self._has_begun = False

    def begin(self) -> None:
        """Start the migration. Once."""
        self._task = self._start(self._live())

    async def _live(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            delivery = tasks.create_task(self._log.deliver())
            self._has_begun = True
            try:
                self._log.raise_objection()
                self._report = await self._run()
            except SiloError as error:
                self._error = error
            except asyncio.CancelledError:
                self._error = MigrationAborted("the migration was cancelled")
                raise
            finally:
                delivery.cancel()
                await self._log.end()
                self._ended.set()

    async def __aenter__(self) -> Self:
        self.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort("the program that asked for it went away")
        await self.wait_ended()

    @property
    def phase(self) -> Phase | None:
        """How far it has come."""
        return self._log.phase

    def events(self) -> AsyncIterator[MigrationEvent]:
        """What happens, from the beginning, whenever this is called; ends with the migration."""
        return self._log.read()

    def switch(self, *, deadline: float | None = None) -> None:
        """Follow no longer (`silo.p2p.settings.MigrationPolicy.follow`): let the target take over now. ``deadline`` as
        in `HostedGroup.migrate`. Returns at once; harmless when it does not follow."""
        self._switch(deadline)

    def abort(self, reason: str) -> None:
        """End the migration if the guest was not stopped yet; harmless later. Returns at once, see `wait_ended`."""
        self._log.object(MigrationAborted(reason))
        # A task that was not begun would never begin: it is for itself to see the objection.
        if self._task is not None and self._has_begun and self._log.phase in UNDOABLE and not self._is_undone:
            self._is_undone = True  # a second cancellation would stop what undoes it
            self._task.cancel()

    async def leave(self, *, wait: bool) -> None:
        """The host closes: abort while that is possible, then wait for the end, or (without ``wait``) stop where it is.

        Stopped past the handover, the migration is continued from its records when the group is opened again.
        """
        if self._ended.is_set() or self._task is None:
            return
        self.abort("the host was told to stop")
        if not wait:
            self._task.cancel()
        await self.wait_ended()

    async def wait_ended(self) -> None:
        """Return when the migration has ended, however it did. No deadline: past the handover it must end itself."""
        await self._ended.wait()

    async def wait_released(self) -> MigrationReport:
        """Return when this host may be switched off.

        `MigrationAborted`: the group is still here and its workload runs. `FencedError`: a third party has it.
        Cancelling the wait does not touch the migration.
        """
        await self.wait_ended()
        if self._error is not None:
            raise self._error
        if self._report is None:
            raise MigrationAborted("the migration ended without a report")
        return self._report
