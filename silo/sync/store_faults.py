"""What can go wrong with an object store, as values: the script that `silo.sync.memory_store` plays.

A `Rule` says which operations it is about and what happens to them (`Fault`). Rules are tried in the order in
which they were added; the first that matches and is not used up decides, and an operation suffers at most
one fault. Nothing here draws random numbers: a simulation that wants chance passes a function that decides
per operation from its own seed.
"""

from __future__ import annotations

import enum
import fnmatch

import attrs

__all__ = ["Fault", "FaultKind", "Operation", "Outcome", "Rule", "Verb"]


class Verb(enum.Enum):
    """The calls of the `silo.abc.ObjectStore` port."""

    PUT = "put"
    PUT_IF = "put_if"
    GET = "get"
    HEAD = "head"
    DELETE = "delete"
    LIST = "list"


MUTATIONS = frozenset({Verb.PUT, Verb.PUT_IF, Verb.DELETE})


class Outcome(enum.Enum):
    """What became of an operation, as only the store itself can know it."""

    PENDING = "pending"
    DONE = "done"
    REFUSED = "refused"
    """The condition of a ``put_if`` was false."""
    FAILED = "failed"
    """The caller got an error and nothing was changed."""
    LOST = "lost"
    """Applied, but the caller never got the answer."""
    ABANDONED = "abandoned"
    """Cancelled or killed before it was applied."""
    LATE = "late"
    """Applied after the caller had been told of a failure, or had died."""
    LATE_REFUSED = "late refused"
    """As `LATE`, but by then its condition was false."""


class FaultKind(enum.Enum):
    """One way to go wrong."""

    FAIL = "fail"
    """`UnavailableError`, and nothing was done."""
    SLOW_DOWN = "slow down"
    """The same, in the words of a store that asks for fewer requests (503)."""
    REFUSE = "refuse"
    """`InvalidRequestError`, and nothing was done: the rights were taken away."""
    LOSE_RESPONSE = "lose response"
    """Done, but the caller gets `UnavailableError`."""
    LATE = "late"
    """`UnavailableError` at once; a mutation lands ``delay_s`` later, or when the test says so if that is None."""
    DELAY = "delay"
    """Reaches the store ``delay_s`` later. Past the store's timeout this is a failure that lands late."""
    HOLD = "hold"
    """Waits on its way to the store until `MemoryStore.release_held`."""
    CORRUPT = "corrupt"
    """One bit of the body is flipped: a put stores it so, a get answers so. Other calls are not changed."""


@attrs.frozen
class Fault:
    """What happens to an operation."""

    kind: FaultKind
    delay_s: float | None = None


@attrs.define(eq=False)
class Operation:
    """One call, as the store saw it: an entry of the operation log."""

    number: int
    client: str
    verb: Verb
    keys: tuple[str, ...]
    """The keys of the call; for a listing, its prefix."""
    size: int = 0
    match: str | None = None
    started: float = 0.0
    """`Clock.monotonic` when the call was made."""
    outcome: Outcome = Outcome.PENDING
    fault: FaultKind | None = None

    @property
    def mutates(self) -> bool:
        """Whether the call may change the store."""
        return self.verb in MUTATIONS

    @property
    def key(self) -> str:
        """The key, or the first one of a deletion."""
        return self.keys[0] if self.keys else ""

    def __str__(self) -> str:
        return f"#{self.number} {self.client} {self.verb.value} {self.key} [{self.outcome.value}]"


@attrs.define(eq=False)
class Rule:
    """A fault for the operations that match: those of some verbs, keys and clients, from the n-th on, so often.

    ``key`` and ``client`` are shell patterns, of which a ``*`` also matches ``/``. ``skip`` matching operations
    pass unharmed first; then ``times`` suffer (``None``: all).
    """

    fault: Fault
    verbs: frozenset[Verb] = frozenset(Verb)
    key: str = "*"
    client: str = "*"
    skip: int = 0
    times: int | None = 1
    hits: int = attrs.field(default=0, init=False)
    """How many operations have suffered so far."""
    seen: int = attrs.field(default=0, init=False)

    def strikes(self, operation: Operation) -> bool:
        """Whether this operation suffers. Counts it: ask once per operation."""
        if operation.verb not in self.verbs or not fnmatch.fnmatchcase(operation.client, self.client):
            return False
        if not any(fnmatch.fnmatchcase(key, self.key) for key in operation.keys or ("",)):
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True
