"""What can be seen of a syncer. Values only."""

from __future__ import annotations

import enum

import attrs

__all__ = ["SyncPhase", "SyncStatus"]


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
