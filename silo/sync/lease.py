"""Leases: how long a writer may serve without having looked at the head, and how long a claimant must wait.

With a lease of T a writer serves until T after the *start* of its last request that showed its epoch in the head: a
commit that was accepted, or a read. After that it stalls, reads too, until the next such request. Whoever wants to
replace a writer that does not answer writes an *intent* into the head, waits T and a margin by its own clock, and
claims over that very head.

::

    writer    HOLDING ──T after the start of the last confirmation──► STALLED ──confirmed──► HOLDING
    claimant  write the intent ──► wait ──► claim, if the head is still that one; else its owner lives: give up

Why the two never serve at once. Requests on the head have an order. One that confirms the writer comes before the
intent: a commit is a compare-and-swap, which an intent makes fail, and a read that shows an intent does not count. So
the writer's last confirmation began before the intent was written, and its lease ends before the claimant's wait,
as long as the clocks do not differ by more than the margin. A writer that sees an intent replaces the head by one
without, which counts again, and the claimant's claim then fails. Calendars play no part: each side measures a duration
with a clock that also counts while the machine is suspended.

What a lease cannot do: a request that was admitted before the lease ended may end after it. The margin is for that.

Pure: no I/O, no clock; the time is given by `Clock.boottime`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from silo.errors import InvalidRequestError

__all__ = ["LEASE_MAX_S", "LEASE_MIN_S", "Lease", "LeaseState", "check_lease", "wait_s"]

LEASE_MIN_S, LEASE_MAX_S = 1.0, 86400.0
DRIFT = 0.01
"""Two clocks in good order differ by a ten-thousandth; those of virtual machines may be worse for a while."""
MARGIN_S = 1.0
"""What the last admitted requests may need, and the way from looking at the clock to acting on it."""
RENEWALS = 3
"""A lease is renewed when a third of it is over, so that one unanswered request does not stall the guest."""


def check_lease(lease_s: float) -> float:
    """The lease, if it is a usable one; else `InvalidRequestError`."""
    if not LEASE_MIN_S <= lease_s <= LEASE_MAX_S:
        raise InvalidRequestError(
            f"a lease of {lease_s:g} s is not usable",
            hint="take 1 s to 24 h; several times what the store needs to answer",
        )
    return lease_s


def wait_s(lease_s: float) -> float:
    """How long a claimant waits by its own clock after its intent is known to be in the head."""
    return lease_s * (1 + DRIFT) + MARGIN_S


class LeaseState(enum.Enum):
    """Whether the writer may serve."""

    HOLDING = "holding"
    STALLED = "stalled"


class Lease:
    """A writer's side. Times are `Clock.boottime`; ``on_confirmed`` is called after each confirmation."""

    def __init__(self, lease_s: float, on_confirmed: Callable[[], object] = lambda: None) -> None:
        self.lease_s = check_lease(lease_s)
        self.on_confirmed = on_confirmed
        self._started = float("-inf")

    @property
    def valid_until(self) -> float:
        """Until when the writer may serve, this instant excluded."""
        return self._started + self.lease_s

    @property
    def renew_at(self) -> float:
        """When to look at the head again, unless a commit does it before."""
        return self._started + self.lease_s / RENEWALS

    def confirmed(self, started: float) -> None:
        """A request that began then has shown our epoch, and no intent."""
        self._started = max(self._started, started)
        self.on_confirmed()

    def state(self, now: float) -> LeaseState:
        """Whether we may serve now."""
        return LeaseState.HOLDING if now < self.valid_until else LeaseState.STALLED
