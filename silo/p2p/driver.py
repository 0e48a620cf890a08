"""Driving one side of a handover: do what the table says, and nothing that it does not say.

A `Driver` loops: carry out the duties of the present state, one effect after the other; turn the outcome, or a
message that came meanwhile, into an event; step. A message that leads to another state cancels the duty. One
that does not is only noted: whoever answers it does so by what it sends on every new link.

An effect fails by raising. Where the table knows a way on (``FAILED``, ``FENCED``), that is taken, whatever was
raised, because a guest that stands still must not be forgotten over a bug. Where the way leads back to the same
state the duty is tried again after a delay, and observers are told.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic

from silo.abc import Clock
from silo.errors import FencedError, InvariantError, MigrationError, SiloError
from silo.events import StepFailed
from silo.p2p.handover import Effect, Event, Machine, State
from silo.p2p.settings import MigrationSettings
from silo.p2p.signal import Signal
from silo.p2p.watch import Watch
from silo.tasks import task_group

__all__ = ["Driver", "Perform"]

_log = logging.getLogger(__name__)

Perform = Callable[[], Awaitable[Event | None]]
"""Carries out an effect; an event ends the duties of the state, ``None`` goes on with the next."""


class Driver(Generic[State]):
    """See the module."""

    def __init__(
        self,
        machine: Machine[State],
        clock: Clock,
        settings: MigrationSettings,
        watch: Watch,
    ) -> None:
        self.machine: Machine[State] = machine
        self.changed = Signal()
        """Notified when anything happens that a duty may wait for."""
        self.error: BaseException | None = None
        """What went wrong last."""
        self._effects: Mapping[Effect, Perform] = {}
        self._clock = clock
        self._settings = settings
        self._watch = watch
        self._inbox: deque[tuple[Event, BaseException | None]] = deque()
        self._failures = 0

    def set_effects(self, effects: Mapping[Effect, Perform]) -> None:
        """How each effect is carried out."""
        self._effects = effects

    def post(self, event: Event, error: BaseException | None = None) -> None:
        """A message came, or somebody wants something. What the present state does not know is dropped.

        Raises nothing: a peer that says what cannot be true now has been caught by its conversation, or has
        repeated itself.
        """
        if self.machine.accepts(event):
            self._inbox.append((event, error))
        self.changed.notify()

    async def drive(self) -> None:
        """Run the machine to a final state and carry out that state's duties, too.

        A cancellation stops it in whatever state it is; what that leaves behind is the caller's business.
        """
        while not self.machine.is_final:
            before = self.machine.state
            event = await self._duty_or_message()
            if self.machine.step(event) is not before:
                self._failures = 0
                _log.info("%s: %s, now %s", self._watch.group, event.value, self.machine.state.value)
            self.changed.notify()
        await self._carry_out()

    async def _duty_or_message(self) -> Event:
        """The outcome of the duties, unless a message decides before."""
        async with task_group() as tasks:
            duty = tasks.create_task(self._carry_out())
            message = tasks.create_task(self.changed.until(lambda: self._decisive() is not None))
            await asyncio.wait((duty, message), return_when=asyncio.FIRST_COMPLETED)
            duty.cancel()
            message.cancel()
        if not duty.cancelled():
            return duty.result()
        decisive = self._decisive()
        if decisive is None:
            raise InvariantError(f"the duties of {self.machine.state.name} were cancelled by nobody")
        self.error = self._inbox.popleft()[1] or self.error
        return decisive

    def _decisive(self) -> Event | None:
        """The first message that leads to another state. Those before it change nothing and are forgotten."""
        while self._inbox:
            event = self._inbox[0][0]
            if self.machine.accepts(event) and self.machine.table.steps[self.machine.state, event] is not (
                self.machine.state
            ):
                return event
            self._inbox.popleft()
        return None

    async def _carry_out(self) -> Event:
        """Carry out all duties of the present state. Whatever goes wrong becomes an event if it can."""
        for effect in self.machine.duties:
            try:
                event = await self._effects[effect]()
            except Exception as error:
                event = await self._failed(effect, error)
            if event is not None:
                return event
        return Event.DONE

    async def _failed(self, effect: Effect, error: Exception) -> Event:
        self.error = error
        if not isinstance(error, SiloError | TimeoutError):
            _log.exception("%s: a bug while trying to %s", self._watch.group, effect.value)
        if isinstance(error, FencedError) and self.machine.accepts(Event.FENCED):
            return Event.FENCED
        if not self.machine.accepts(Event.FAILED):
            raise error
        if self.machine.table.steps[self.machine.state, Event.FAILED] is self.machine.state:
            delay = self.retry_delay_s()
            self._watch.tell(StepFailed, step=effect.value, reason=str(error), retry_s=delay)
            await asyncio.sleep(delay)
        return Event.FAILED

    def retry_delay_s(self) -> float:
        """Doubles with each failure in a row, from ``retry_min_s`` to ``retry_max_s``."""
        delay: float = min(self._settings.retry_min_s * 2**self._failures, self._settings.retry_max_s)
        self._failures += 1
        return delay

    @property
    def reason(self) -> str:
        """What went wrong last, for people."""
        return str(self.error) if self.error is not None else ""

    def aborted(self, kind: type[MigrationError], message: str) -> MigrationError:
        """An error of that kind which says why."""
        error = kind(f"{message}: {self.reason}" if self.reason else message)
        error.__cause__ = self.error
        return error
