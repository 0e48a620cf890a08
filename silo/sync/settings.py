"""The numbers of sync and restore, validated where they enter. Values only."""

from __future__ import annotations

import attrs

from silo.errors import InvalidRequestError
from silo.sync.lease import check_lease
from silo.sync.retention import RetentionPolicy

__all__ = ["CollectorSettings", "FetchSettings", "RetrySettings", "SyncSettings"]

MIB = 1024 * 1024


@attrs.frozen(kw_only=True)
class RetrySettings:
    """Delays in seconds. The n-th delay doubles until ``delay_max_s``; half of each is chance."""

    delay_min_s: float = 0.1
    delay_max_s: float = 15.0
    refused_delay_s: float = 30.0
    """After a refusal, such as for want of rights: somebody must mend it, and that takes a while."""
    request_timeout_s: float = 60.0
    """One request that takes longer counts as unanswered: for 32 MiB that is half a megabyte per second."""

    def __attrs_post_init__(self) -> None:
        positive = min(self.delay_min_s, self.refused_delay_s, self.request_timeout_s) > 0
        if not positive or self.delay_min_s > self.delay_max_s:
            raise InvalidRequestError("delays must be positive, and the least not above the largest")


@attrs.frozen(kw_only=True)
class CollectorSettings:
    """When the collector works. A group that is idle, and has nothing dead left in the store, sends nothing."""

    interval_s: float = 600.0
    """Time between two passes, when anything was committed since the last one."""
    grace_s: float = 300.0
    """How long an object that nothing needs is left alone, for the sake of readers without a pin."""
    pause_s: float = 10.0
    """Least time between two passes, when much is being overwritten."""
    share: float = 0.1
    """How much must be sent, as a part of what is live, so that a pass is made before its time."""
    is_on: bool = True

    def __attrs_post_init__(self) -> None:
        if not (0 < self.pause_s <= self.interval_s and self.grace_s >= 0 and self.share > 0):
            raise InvalidRequestError("the collector's interval must be positive and its grace not negative")


@attrs.frozen(kw_only=True)
class SyncSettings:
    """Numbers of the syncer. Sizes in bytes."""

    rpo_s: float = 10.0
    """How old the newest generation may become: cuts are started so that commits keep to it."""
    segment_size: int = 32 * MIB
    """Largest segment, but one chunk always fits. One PUT of this size costs what a PUT of one chunk costs."""
    window: int = 96 * MIB
    """Most bytes that are being uploaded at once. Memory is this, plus one segment being packed."""
    batch_size: int = 4 * MIB
    """Content that is hashed and compressed in one call in a thread. Many small calls cost more than the way there:
    the threads and the event loop then wake each other up all the time."""
    threads: int = 2
    """Threads that hash and compress."""
    cut_size: int = 256 * MIB
    """Content that a cut takes at most, as long as the guest is not faster than the upload: what is dirty beyond that
    is uploaded ahead of the cut, in rounds, while the guest writes on."""
    round_size: int = 1024 * MIB
    """Content of one such round. One that fails is read again."""
    rate_bps: float | None = None
    """Limit of the upload in bytes per second, over a few seconds; ``None`` for no limit."""
    checkpoint_segments: int = 64
    """Segments since the root from which on a new root is considered; four times as many force one. A restore
    reads the index of each."""
    flush_timeout_s: float = 60.0
    """How long a flush that must reach the store waits for its commit before it fails (`silo.flushing`)."""
    throttle: bool = False
    """Slow the guest's writes down when more is exposed than the store takes within the target (`guest_limit` in
    `silo.sync.planner`). Without it the recovery point slips, which the status shows."""
    drain_timeout_s: float = 60.0
    """How long closing waits for the last commit."""
    lease_s: float | None = None
    """Serve no longer than this after the head was last seen to be ours; ``None``: until it is seen not to be. A lease
    lets another host take over without anybody's assertion, and stalls the guest while the store is away."""
    retry: RetrySettings = attrs.field(factory=RetrySettings)
    collector: CollectorSettings = attrs.field(factory=CollectorSettings)
    points: RetentionPolicy = attrs.field(factory=RetentionPolicy)
    """Which restore points are made by themselves; none, if not said otherwise."""
    hot_window_s: float = 180.0
    """For how long after a start reads are recorded, to be fetched first after the next; 0 records none."""

    def __attrs_post_init__(self) -> None:
        if self.lease_s is not None:
            check_lease(self.lease_s)
        if min(self.rpo_s, self.drain_timeout_s, self.flush_timeout_s) <= 0 or not 1 <= self.threads <= 64:
            raise InvalidRequestError("rpo_s and timeouts must be positive, threads from 1 to 64")
        if not (0 < self.segment_size <= 1024 * MIB and self.batch_size > 0 and self.checkpoint_segments > 0):
            raise InvalidRequestError(
                "segments have at most 1 GiB; segments, batches and checkpoints cannot be empty"
            )
        if self.cut_size <= 0 or self.round_size <= 0:
            raise InvalidRequestError("cuts and rounds cannot be empty")
        if self.window < self.segment_size:
            raise InvalidRequestError("the window must hold at least one segment")
        if self.rate_bps is not None and self.rate_bps <= 0:
            raise InvalidRequestError(
                "a limit of the rate must be positive", hint="leave it out for no limit"
            )


@attrs.frozen(kw_only=True)
class FetchSettings:
    """Numbers of reading from the store. Sizes in bytes."""

    demand_lanes: int = 32
    """Requests at once on behalf of guests that wait. Nothing else ever takes one of these."""
    background_lanes: int = 8
    """Requests at once for hydration and restore."""
    run_size: int = 4 * MIB
    """Largest piece of a segment that a background request fetches."""
    run_gap: int = 64 * 1024
    """Bytes between two wanted chunks that are fetched for nothing rather than with two requests."""
    patience_s: float = 60.0
    """How long a guest's read is tried again before it fails with EIO."""
    threads: int = 2
    """Threads that decompress and verify."""
    retry: RetrySettings = attrs.field(
        factory=lambda: RetrySettings(delay_min_s=0.05, delay_max_s=2.0, request_timeout_s=20.0)
    )

    def __attrs_post_init__(self) -> None:
        if self.demand_lanes < 1 or self.background_lanes < 1 or not 1 <= self.threads <= 64:
            raise InvalidRequestError("at least one lane each is needed, and 1 to 64 threads")
        if self.run_size < 1 or self.run_gap < 0 or self.patience_s < 0:
            raise InvalidRequestError("run_size must be positive, run_gap and patience_s not negative")
