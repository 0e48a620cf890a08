"""Slowing a guest's writes, when it makes content faster than that can be carried away.

A `Throttle` belongs to a group. Whoever has a reason may set a limit (`limit`); the lowest counts. What is limited is
how fast chunks *become* dirty: a write to chunks that are dirty already adds nothing to what must be carried, and
passes freely. So a guest that keeps rewriting a hot set is not slowed down, and one that spreads small writes pays for
whole chunks, as the link or the store does.

Without a limit nothing of this is on the way of a request: the volume's synchronous path looks at one flag, the
one that says that it is read-only. With a limit, writes take the asynchronous way and wait their turn there
(`silo.volume.Volume.write`). Reads, flushes and zeroing are never slowed.

The arithmetic is `Bucket`, which is pure. `Throttle.limit` may be called at any time; who waits sees it at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from silo.abc import Clock
from silo.errors import InvalidRequestError

__all__ = ["Bucket", "Throttle"]

BURST_S = 0.1
"""What may be written at once after a pause, in time at the limit."""


class Bucket:
    """How long the next one must wait. Each may overdraw it, and those behind wait until that is paid."""

    def __init__(self) -> None:
        self._credit = 0.0
        self._at = 0.0

    def delay_s(self, rate_bps: float, now: float) -> float:
        """Seconds until something may be taken at this rate; 0 when it may be taken now."""
        self._credit = min(self._credit + rate_bps * max(0.0, now - self._at), rate_bps * BURST_S)
        self._at = max(now, self._at)
        # Less than a byte is a rounding error, and a delay that is too short for a clock to notice would never end.
        return -self._credit / rate_bps if self._credit <= -1.0 else 0.0

    def take(self, size: int) -> None:
        """So many bytes are taken; `delay_s` has said that they may."""
        self._credit -= size


class Throttle:
    """See the module. Belongs to one event loop."""

    def __init__(self, clock: Clock, on_change: Callable[[], object]) -> None:
        """``on_change`` is called when `rate_bps` has changed from or to ``None``."""
        self.rate_bps: float | None = None
        """The limit in bytes of chunks per second; ``None`` for none."""
        self.waited_s = 0.0
        """How long guests' writes have been held back, all together."""
        self._limits: dict[str, float] = {}
        self._clock = clock
        self._on_change = on_change
        self._bucket = Bucket()
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    def limit(self, reason: str, rate_bps: float | None) -> None:
        """Set the limit of this reason, or take it back with ``None``."""
        if rate_bps is None:
            self._limits.pop(reason, None)
        elif rate_bps <= 0:
            raise InvalidRequestError(f"a guest cannot be limited to {rate_bps} bytes per second")
        else:
            self._limits[reason] = rate_bps
        before, self.rate_bps = self.rate_bps, min(self._limits.values(), default=None)
        if self.rate_bps != before:
            event, self._changed = self._changed, asyncio.Event()
            event.set()
        if (self.rate_bps is None) != (before is None):
            self._on_change()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Who limits at present."""
        return tuple(sorted(self._limits))

    async def pay(self, size: int) -> None:
        """Wait until so many bytes may become dirty. First come, first served; cancellation costs nothing.

        No deadline: it is bounded by what was paid for before, at a rate that its owner keeps above nothing.
        """
        if not size:
            return
        started = self._clock.monotonic()
        try:
            async with self._turn:
                while (rate := self.rate_bps) is not None:
                    delay_s = self._bucket.delay_s(rate, self._clock.monotonic())
                    if not delay_s:
                        self._bucket.take(size)
                        return
                    try:
                        async with asyncio.timeout(delay_s):
                            await self._changed.wait()
                    except TimeoutError:
                        continue
        finally:
            self.waited_s += self._clock.monotonic() - started
