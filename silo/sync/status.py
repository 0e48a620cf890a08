"""What can be seen of a syncer. Values only."""

from __future__ import annotations

import enum

import attrs

__all__ = ["ALARMS", "SyncPhase", "SyncStatus", "alarms_of"]

ALARMS = ("behind", "failing", "fenced")
"""What an operator should look at: the recovery point has slipped, the store or the disk fails, another host has the
group."""


class SyncPhase(enum.Enum):
    """What the syncer is doing."""

    WAITING = "waiting"
    """For the next cut to be due."""
    HELD = "held"
    """Commits are held back; no cut is taken."""
    AHEAD = "uploading ahead"
    """More is dirty than a cut should take: most of it is uploaded first, while the guest writes on."""
    UPLOADING = "uploading"
    COMMITTING = "committing"
    FAILING = "failing"
    """The last cut was abandoned; waiting before the next."""
    FENCED = "fenced"
    """Another writer owns the group. Final."""
    CLOSED = "closed"
    """Final."""


@attrs.frozen(kw_only=True)
class SyncStatus:
    """One look at a syncer."""

    phase: SyncPhase
    epoch: int
    generation: int
    cut_time: float
    """POSIX seconds of the newest generation."""
    rpo_s: float
    """How old the state is that would be recovered if this host vanished now. Unchanged volumes do not age."""
    exposed_bytes: int
    """Upper bound of what would be lost then."""
    target_s: float
    """What the RPO should stay below."""
    rate_bps: float | None
    """How fast content got into the store last, in bytes of chunks per second; ``None`` when that is not known yet."""
    backlog_bytes: int
    """What is waiting to be uploaded: less than that when a part is in the store, but not committed."""
    copied_bytes: int
    """Old content that is kept aside for the cut in progress."""
    holds: tuple[str, ...]
    error: str
    """Why something is being tried again; empty when all is well."""
    attempts: int
    failing_s: float
    cuts: int
    abandoned_cuts: int
    sent_bytes: int
    sent_objects: int
    elided_chunks: int
    """Chunks that were written with what the store had already."""
    window: int
    """Bytes that may be on their way to the store at once, as adapted to how that goes."""

    @property
    def alarms(self) -> tuple[str, ...]:
        """As `alarms_of`."""
        return alarms_of(self)


def alarms_of(status: SyncStatus) -> tuple[str, ...]:
    """Which of `ALARMS` there is reason for.

    *Behind*: a generation exists and is older than half as much again as the target says. A first sync is not
    behind, because nothing was promised yet. *Failing*: something has been tried for longer than the target.
    """
    if status.phase is SyncPhase.FENCED:
        return ("fenced",)
    behind = status.generation > 0 and status.rpo_s > 1.5 * status.target_s and status.exposed_bytes > 0
    failing = bool(status.error) and status.failing_s > status.target_s
    return tuple(name for name, raised in (("behind", behind), ("failing", failing)) if raised)
