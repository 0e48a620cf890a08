"""Trying again: how long to wait, how long one request may take, and what to show meanwhile.

Stores retry nothing by themselves. Whoever calls one decides whether an operation may be repeated (a read, an
upload of the same bytes under the same key) or must first be resolved (a compare-and-swap).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import attrs

from silo.abc import Clock
from silo.errors import CapacityError, InvalidRequestError, SiloError, UnavailableError
from silo.sync.settings import RetrySettings

__all__ = ["STORE_TROUBLE", "Backoff", "Trouble", "bounded"]

T = TypeVar("T")

STORE_TROUBLE = (UnavailableError, InvalidRequestError, CapacityError)
"""What a store may answer to a request that was right: no answer, no right, no room. When the group is being opened
the last two are mistakes that its owner should hear of at once; later they are troubles that pass when somebody mends
them, and no reason to lose what is waiting to be stored."""


@attrs.frozen
class Trouble:
    """Why something is being tried again, for whoever looks at the status."""

    error: SiloError
    attempts: int
    since: float
    """`Clock.monotonic` of the first failure."""


class Backoff:
    """The delays of one operation, and its `Trouble` so far."""

    def __init__(self, clock: Clock, settings: RetrySettings) -> None:
        self.trouble: Trouble | None = None
        self._clock = clock
        self._settings = settings

    def failed(self, error: SiloError) -> float:
        """Take note of a failure. Returns how many seconds to wait before the next attempt."""
        attempts = self.trouble.attempts if self.trouble else 0
        since = self.trouble.since if self.trouble else self._clock.monotonic()
        self.trouble = Trouble(error, attempts + 1, since)
        delay = min(self._settings.delay_max_s, self._settings.delay_min_s * 2.0 ** min(attempts, 60))
        if isinstance(error, InvalidRequestError):
            delay = self._settings.refused_delay_s
        # Half fixed, half chance: clients that failed together must not come back together.
        return delay * (0.5 + int.from_bytes(self._clock.token(4), "little") / 2**33)

    def succeeded(self) -> None:
        """Start again from the least delay."""
        self.trouble = None


async def bounded(call: Callable[[], Awaitable[T]], timeout_s: float) -> T:
    """The result of one request; `UnavailableError` (outcome unknown) when it takes longer than ``timeout_s``."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call()
    except TimeoutError:
        raise UnavailableError(f"the store did not answer within {timeout_s:g} s") from None
