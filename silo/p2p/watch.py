"""What observers see of a migration, and how long each of its phases took."""

from __future__ import annotations

from collections.abc import Callable

from silo.abc import Clock
from silo.events import MigrationEvent, Phase, PhaseEntered, PhaseTiming
from silo.p2p.ports import Consent, Emit

__all__ = ["Watch"]


class Watch:
    """See the module."""

    def __init__(self, group: str, clock: Clock, emit: Emit, consent: Consent) -> None:
        self.group = group
        self.phase: Phase | None = None
        self.started = clock.monotonic()
        """When the first phase began."""
        self._clock = clock
        self._emit = emit
        self._consent = consent
        self._entered = self.started
        self._timings: list[PhaseTiming] = []

    def tell(self, kind: Callable[..., MigrationEvent], **fields: object) -> None:
        """Emit an event of a kind, with group and time filled in."""
        self._emit(kind(group=self.group, at=self._clock.monotonic(), **fields))

    def enter(self, phase: Phase, reason: str = "") -> None:
        """A phase begins. Again the same one is nothing new."""
        if phase is not self.phase:
            self._turn(phase)
            self.tell(PhaseEntered, phase=phase, reason=reason)

    async def ask(self, phase: Phase) -> None:
        """A phase begins unless an observer objects; raises what the observer raises."""
        if phase is not self.phase:
            self._turn(phase)
            await self._consent(PhaseEntered(group=self.group, at=self._clock.monotonic(), phase=phase))

    def _turn(self, phase: Phase) -> None:
        now = self._clock.monotonic()
        if self.phase is None:
            self.started = now
        else:
            self._timings.append(PhaseTiming(self.phase, now - self._entered))
        self.phase, self._entered = phase, now

    @property
    def timings(self) -> tuple[PhaseTiming, ...]:
        """The phases so far; the present one, too, until the last has been entered."""
        if self.phase in (None, Phase.ENDED):
            return tuple(self._timings)
        return (*self._timings, PhaseTiming(self.phase, self._clock.monotonic() - self._entered))
