"""The numbers of migration, validated where they enter. Values only."""

from __future__ import annotations

import attrs

from silo.errors import InvalidRequestError

__all__ = ["CONNECTIONS_MAX", "MigrationPolicy", "MigrationSettings"]

MIB = 1024 * 1024
CONNECTIONS_MAX = 16


@attrs.frozen(kw_only=True)
class MigrationPolicy:
    """What whoever asks for a migration may choose."""

    durable_before_switch: bool = False
    """Everything is committed to the store before the target may claim the group. It lengthens the time in which the
    guest stands still by the upload of what it wrote last; without it, and until the target has everything, the loss
    of the source loses what only the source has. Given up, and said, when the deadline leaves no time for it."""
    evacuate: bool = True
    """With a deadline: when no target accepts in time, or the link is too slow, bring the group to the store and stop
    it there, to be resumed elsewhere. Otherwise it stays, and dies with its host."""
    follow: bool = False
    """Keep the target close behind instead of switching over, until `silo.moving.Move.switch`: a warm standby, which
    has only the last round to take when it is needed."""
    throttle: bool = True
    """With a deadline: slow the guest's writes while it must be uploaded faster than it writes."""


@attrs.frozen(kw_only=True)
class MigrationSettings:
    """Both hosts have their own. Sizes in bytes."""

    window: int = 16 * MIB
    """Pushes under way and not acknowledged. 16 MiB fills 10 Gbit/s at 13 ms of round trip."""
    batch: int = MIB
    """Content that is read, hashed and sent, or received and verified, without giving way to others."""
    connections: int = 1
    """Over so many connections content is pushed; demands have another one to themselves. More help where a network
    gives each only a part of its capacity. Where it does not, as on loopback, they only cost."""
    compress: bool = True
    """Compress what is pushed, where a sample says that it arrives sooner so."""
    rate_bps: float | None = None
    """Limit of what is pushed, in bytes per second; ``None`` for no limit. Demand reads do not count."""
    rounds_max: int = 12
    """After so many rounds of pre-copy the switchover comes, whatever is still dirty."""
    switch_size: int = 4 * MIB
    """So little left is not worth another round of pre-copy."""
    switch_s: float = 0.1
    """Nor is what the link carries in this time."""
    hot_size: int = 512 * MIB
    """Most bytes of chunks that the store has and that are pushed all the same because they are hot."""
    neighbours: int = 7
    """Chunks that follow a demanded one, while the link to its guest is warm."""
    accept_timeout_s: float = 120.0
    """How long the source waits for the target's owner to accept the offer."""
    connect_timeout_s: float = 10.0
    keepalive_s: float = 2.0
    """A side that has nothing to say says so this often."""
    silence_s: float = 10.0
    """A link on which nothing was heard for this long is broken."""
    redial_min_s: float = 0.05
    redial_max_s: float = 5.0
    """A broken link is dialled again after a delay that doubles from one to the other."""
    patience_s: float = 30.0
    """Before the handover, how long either side waits for a broken link to return before it gives the
    migration up."""
    answer_timeout_s: float = 10.0
    """How long the source waits, after the handover, for a sign of the target before it asks for the group back."""
    claim_timeout_s: float = 60.0
    """How long a target that gives such signs may take for its claim: a few round trips to the store, each of which
    may have to be repeated. The guest stands still meanwhile."""
    workload_timeout_s: float = 30.0
    """For each hook of the workload, unless the migration's deadline is earlier."""
    progress_s: float = 0.5
    follow_s: float = 1.0
    """A target that is kept close behind gets what was written this often."""
    look_s: float = 0.25
    """How often the plan is looked at again while content moves (`silo.p2p.budget`)."""
    retry_min_s: float = 0.1
    retry_max_s: float = 10.0
    """Between attempts at what must succeed: a claim, a flush, the resumption of the workload."""
    hydrate_window: int = 16
    """Chunks that are pulled from the store at once in the background."""

    def __attrs_post_init__(self) -> None:
        if not MIB <= self.batch <= self.window <= 1 << 30:
            raise InvalidRequestError("a batch has at least 1 MiB, and the window at least one batch")
        if self.rate_bps is not None and self.rate_bps <= 0:
            raise InvalidRequestError(
                "a limit of the rate must be positive", hint="leave it out for no limit"
            )
        if self.rounds_max < 1 or self.switch_size < 0 or self.hot_size < 0 or self.neighbours < 0:
            raise InvalidRequestError("at least one round is needed, and sizes cannot be negative")
        if not 0 < self.keepalive_s < self.silence_s:
            raise InvalidRequestError("silence must last longer than the pause between two signs of life")
        if not 1 <= self.connections <= CONNECTIONS_MAX:
            raise InvalidRequestError(f"content is pushed over 1 to {CONNECTIONS_MAX} connections")
        times = attrs.asdict(self, filter=lambda field, _: field.name.endswith("_s"))
        if min(times.values()) <= 0 or self.hydrate_window < 1:
            raise InvalidRequestError("times and windows must be positive")
        if self.redial_min_s > self.redial_max_s or self.retry_min_s > self.retry_max_s:
            raise InvalidRequestError("the least delay cannot be above the largest")
