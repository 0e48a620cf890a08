"""What happens to a group, for whoever watches: frozen values, one stream per migration.

Observers (`silo.hooks.observers`) get each event in order, and until the guest is stopped they may end the
migration by raising; later their errors are reported and change nothing.
Times are `Clock.monotonic` seconds, sizes are bytes. ``as_dict`` gives what ``--json`` prints: plain
values under the names of the attributes, and the kind of event under ``event``.
"""

from __future__ import annotations

import enum
import re
from typing import Any

import attrs

__all__ = [
    "Decided",
    "HandoverDoubt",
    "LinkChanged",
    "MigrationEvent",
    "MigrationReport",
    "Outcome",
    "Phase",
    "PhaseEntered",
    "PhaseTiming",
    "Progress",
    "RoundStarted",
    "StepFailed",
    "SwitchedOver",
]


class Phase(enum.Enum):
    """How far a migration has come. In this order, though not all are passed on either side."""

    CONNECTING = "connecting"
    """Source: until the target has accepted."""
    PRE_COPY = "pre-copy"
    FOLLOWING = "following"
    """The target is kept close behind, until it is told to take over."""
    STORING = "storing"
    """The group is brought up to date in the store while its guest runs: on the way there, or before a switchover."""
    SWITCHOVER = "switchover"
    """From the decision to stop the guest until it is known who owns the group. Source: a veto is still heard."""
    IN_DOUBT = "in doubt"
    """Source: no answer to the handover. The guest stays suspended until the register has answered."""
    POST_COPY = "post-copy"
    """The guest runs on the target; chunks that only the source has are still on their way."""
    EVACUATED = "evacuated"
    """Nothing exists only at the source any more."""
    HYDRATED = "hydrated"
    """Target: nothing is absent any more."""
    ENDED = "ended"
    """See the report."""


class Outcome(enum.Enum):
    """How a migration ended."""

    RELEASED = "released"
    """Source: the group has moved, and nothing here is needed any more."""
    STORED = "stored"
    """Source: the group is whole in the store and runs nowhere; any host may resume it. Nothing here is needed."""
    ABORTED = "aborted"
    """Source: the group has stayed, and its workload runs. Target: nothing has come of it."""
    FENCED = "fenced"
    """A third party took the group."""
    TAKEN = "taken"
    """Target: the group is here, whole."""


def _plain(_: object, __: object, value: object) -> object:
    return value.value if isinstance(value, enum.Enum) else value


@attrs.frozen(kw_only=True)
class MigrationEvent:
    """What all events have in common."""

    group: str
    at: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values; ``event`` is the kind: ``phase-entered``, ``round-started``, ``progress``, ..."""
        kind = re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower()
        return {"event": kind, **attrs.asdict(self, value_serializer=_plain)}


@attrs.frozen(kw_only=True)
class PhaseEntered(MigrationEvent):
    """A phase begins, and with it the one before ends."""

    phase: Phase
    reason: str = ""
    """For people, where there is something to say."""


@attrs.frozen(kw_only=True)
class Decided(MigrationEvent):
    """Source: what follows, and why. Told when the decision is another one than before."""

    action: str
    """``go on``, ``another round``, ``stop the guest``, ``go to the store instead``."""
    reason: str
    left_s: float | None = None
    """Until the deadline; ``None`` without one."""
    fits_bytes: int | None = None
    """What can still be carried before it, after a switchover now."""
    exposed_bytes: int = 0
    """What would have to be."""
    late_bytes: int = 0
    """What will not have been carried by then: more than 0 means that this host must live longer than it was told."""
    write_bps: float | None = None
    """The guest's writes are limited to this; ``None``: they are not."""


@attrs.frozen(kw_only=True)
class RoundStarted(MigrationEvent):
    """Source: another pass over what the target lacks."""

    round: int
    chunks: int
    size: int


@attrs.frozen(kw_only=True)
class Progress(MigrationEvent):
    """About twice a second while chunks move."""

    phase: Phase
    bytes_peer: int
    """Content that has gone over the link so far."""
    rate_bps: float
    exposed_bytes: int
    """Content that would be lost with the source now, because only the source has it."""
    remaining_bytes: int
    """Content that is still to be sent in this phase, as far as is known."""
    bytes_stored: int = 0
    """Content that was uploaded to the store on the way, as it is there: compressed."""
    eta_s: float | None
    """Seconds until nothing remains at this rate; ``None`` when that is not known."""


@attrs.frozen(kw_only=True)
class SwitchedOver(MigrationEvent):
    """Source: the guest runs on the other host. The fields are those of the report."""

    downtime_ms: float
    workload_ms: float
    bytes_peer: int


@attrs.frozen(kw_only=True)
class LinkChanged(MigrationEvent):
    """The link to the other host came up, or broke. It is tried again by itself."""

    up: bool
    reason: str = ""


@attrs.frozen(kw_only=True)
class HandoverDoubt(MigrationEvent):
    """Nobody can say yet who owns the group; the guest stays suspended, and the question is asked again."""

    reason: str


@attrs.frozen(kw_only=True)
class StepFailed(MigrationEvent):
    """Something that must succeed has failed and will be tried again after ``retry_s``."""

    step: str
    reason: str
    retry_s: float


@attrs.frozen
class PhaseTiming:
    """How long a phase took."""

    phase: Phase
    duration_s: float


@attrs.frozen(kw_only=True)
class MigrationReport:
    """What it came to. The durations of ``phases`` add up to ``duration_s``."""

    group: str
    migration: str
    outcome: Outcome | None = None
    """``None`` while it goes on."""
    reason: str = ""
    phases: tuple[PhaseTiming, ...] = ()
    duration_s: float = 0.0
    rounds: int = 0
    bytes_peer: int = 0
    """Content that went over the link, both lanes."""
    bytes_store: int = 0
    """Content that the target had pulled from the store when it was evacuated."""
    bytes_stored: int = 0
    """What a group that went to the store has uploaded on its way."""
    downtime_ms: float | None = None
    """By the source's clock, from before `Workload.suspend` until TAKEN arrived, without the workload's own hooks."""
    workload_ms: float | None = None
    """What the workload's hooks took of that time, on both hosts."""
    evacuated_ms: float | None = None
    """From the start until *evacuated* was known at the source."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as those of the events."""
        return attrs.asdict(self, value_serializer=_plain)
