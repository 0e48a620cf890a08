"""Every error that Silo raises, one class per thing that a caller would do differently.

The tree::

    SiloError
    ├── InvalidRequestError   a bug in the caller          never retry     EINVAL
    ├── ClosedError           the caller closed it         never retry     ESHUTDOWN
    ├── FencedError           somebody holds a higher epoch stop           EIO
    ├── UnavailableError      store, peer or link is away  retry later     EIO when given up
    ├── CorruptionError       a digest does not match      another source  EIO
    ├── CapacityError         disk full, quota, limit      after clean-up  ENOSPC
    ├── ProtocolError
    │   ├── LocalProtocolError    we would have sent nonsense
    │   └── RemoteProtocolError   the other side sent nonsense
    ├── MigrationError
    │   ├── MigrationAborted      the source owns the group and runs again
    │   └── HandoverInDoubt       nobody can say yet who owns the group
    └── InvariantError        a bug in Silo                stop, keep the evidence

Each instance carries a ``hint``: one sentence that says what a person can do about it. ``str(error)`` is
the message followed by the hint. ``retryable`` and ``errno`` are facts about the class.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar

__all__ = [
    "CapacityError",
    "ClosedError",
    "CorruptionError",
    "FencedError",
    "HandoverInDoubt",
    "InvalidRequestError",
    "InvariantError",
    "LocalProtocolError",
    "MigrationAborted",
    "MigrationError",
    "ProtocolError",
    "RemoteProtocolError",
    "SiloError",
    "UnavailableError",
]


class SiloError(Exception):
    """The root of the tree; catch it to catch everything that Silo raises on purpose."""

    retryable: ClassVar[bool] = False
    errno: ClassVar[int] = _errno.EIO

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidRequestError(SiloError, ValueError):
    """The request makes no sense: out of bounds, misaligned, a wrong setting."""

    errno = _errno.EINVAL


class ClosedError(SiloError):
    """The object was closed by its owner; a second use is a bug of the caller."""

    errno = _errno.ESHUTDOWN


class FencedError(SiloError):
    """Another writer holds a higher epoch. This one must stop and must never be retried."""


class UnavailableError(SiloError):
    """The store, the peer or the link did not answer, or answered that it cannot now.

    For a mutation the outcome is *unknown*: it may have been applied.
    """

    retryable = True


class CorruptionError(SiloError):
    """Bytes do not have the digest that was recorded for them; try another source."""


class CapacityError(SiloError):
    """A disk, a quota or one of our own limits is full; retry after making room."""

    errno = _errno.ENOSPC


class ProtocolError(SiloError):
    """A peer or client and we disagree about the protocol."""

    errno = _errno.EPROTO


class LocalProtocolError(ProtocolError):
    """Our own side asked for something that the protocol does not allow in this state."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something that the protocol does not allow; only its connection dies."""


class MigrationError(SiloError):
    """A migration ended without moving the group."""


class MigrationAborted(MigrationError):
    """The migration failed before the claim: the source still owns the group, and its workload runs."""

    retryable = True


class HandoverInDoubt(MigrationError):
    """The handover was sent, and whether the target claimed cannot be known now. The workload stays suspended."""


class InvariantError(SiloError):
    """A promise inside Silo is broken. Stop, keep the state directory, report it."""
