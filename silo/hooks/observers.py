"""Those who watch a migration, and may object to it.

An observer is a function of one event (`silo.events`), ``async def`` or plain; a plain one runs in a thread. Each
observer gets every event, in order, one at a time. What it takes longer than its time it does not get to finish:
see `silo.hooks.calls`, which calls observers like any other hook. Only `silo.events.Progress` is ever left
out, when a newer one came before it was delivered.

`Observers.consent` asks everybody and raises when somebody objects, and so it is called where a migration can
still turn back. To object an observer raises. It may do so early: a `silo.SiloError` that it raised over any event
before is an objection, too. One that is overdue when it is asked has not agreed, which is the same. Whoever
only wants to look on, and hold up nothing, reads the migration's stream of events instead.

All other errors are logged and change nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from silo.abc import Clock
from silo.errors import MigrationError, SiloError, UnavailableError
from silo.events import MigrationEvent, Progress
from silo.hooks.calls import HookCalls

__all__ = ["OBSERVER_TIMEOUT_S", "Observer", "Observers"]

log = logging.getLogger(__name__)

Observer = Callable[[MigrationEvent], Awaitable[None] | None]

OBSERVER_TIMEOUT_S = 5.0
"""For each event. A tenth of it is long, when a host has 30 s to live."""


class Observers:
    """The observers of one migration. `emit` and `consent` are what ``silo.p2p.ports`` calls ``Emit`` and ``Consent``.

    Events wait until `run` or `consent` delivers them. Concurrent calls are allowed.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        clock: Clock,
        *,
        group: str,
        timeout_s: float = OBSERVER_TIMEOUT_S,
    ) -> None:
        self._observers = [
            (observer, HookCalls(f"the migration of {group}", clock)) for observer in observers
        ]
        self._clock = clock
        self._timeout_s = timeout_s
        self._waiting: deque[MigrationEvent] = deque()
        self._objections: list[UnavailableError] = []
        self._news = asyncio.Event()
        self._delivery = asyncio.Lock()

    def emit(self, event: MigrationEvent) -> None:
        """Let the observers have the event soon. Never waits, never raises."""
        if not self._observers:
            return
        if self._waiting and isinstance(event, Progress) and isinstance(self._waiting[-1], Progress):
            self._waiting.pop()
        self._waiting.append(event)
        self._news.set()

    async def consent(self, event: MigrationEvent) -> None:
        """Return when every observer has seen the event and all before it, and nobody objects.

        Raises `MigrationError` with the first objection; the others have seen the event all the same. Takes no
        longer than observers may take for it and for the events that wait. A cancellation interrupts them.
        """
        async with self._delivery:
            await self._deliver_waiting()
            objections = self._objections + await self._deliver(event)
        if objections:
            raise MigrationError(
                f"an observer objects: {objections[0].message}", hint=objections[0].hint
            ) from objections[0]

    async def run(self) -> None:
        """Deliver what is emitted, until cancelled. Waits for as long as nothing happens."""
        while True:
            await self._news.wait()
            async with self._delivery:
                await self._deliver_waiting()

    async def drain(self) -> None:
        """Return when everything that was emitted until now has been delivered."""
        async with self._delivery:
            await self._deliver_waiting()

    async def _deliver_waiting(self) -> None:
        while self._waiting:
            event = self._waiting.popleft()
            for error in await self._deliver(event):
                if isinstance(error.__cause__, SiloError):
                    self._objections.append(error)
                else:
                    log.warning("%s (event %s)", error, type(event).__name__)
        self._news.clear()

    async def _deliver(self, event: MigrationEvent) -> list[UnavailableError]:
        """Tell everybody at the same time. Returns what they raised, in their order."""
        deadline = self._clock.monotonic() + self._timeout_s
        async with asyncio.TaskGroup() as group:
            calls = [
                group.create_task(_tell(observer, calls, event, deadline))
                for observer, calls in self._observers
            ]
        return [error for call in calls if (error := call.result()) is not None]


async def _tell(
    observer: Observer, calls: HookCalls, event: MigrationEvent, deadline: float
) -> UnavailableError | None:
    name = getattr(observer, "__qualname__", type(observer).__qualname__)
    try:
        await calls.call(f"observer {name}", deadline, observer, event)
    except UnavailableError as error:
        return error
    return None
