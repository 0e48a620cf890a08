"""Who goes first on the way to the store: guests that wait for a chunk, before uploads and hydration.

Requests cannot be taken back once they are under way, but the next one can wait. So an upload or a background fetch
that is about to begin gives way while a demand read is in flight, for a bounded time: a guest that reads all the
time slows the background down, and never stops it, because the recovery point must go on as well.

One event loop; an object per link to a store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Traffic"]

GIVE_WAY_S = 0.5
"""How long one request of the background waits for demand reads at most: some dozens of them."""


class Traffic:
    """See the module. Concurrent calls are what it is for."""

    def __init__(self, give_way_s: float = GIVE_WAY_S) -> None:
        self.gave_way = 0
        """How often a request of the background has waited."""
        self._give_way_s = give_way_s
        self._demands = 0
        self._clear = asyncio.Event()
        self._clear.set()

    @contextmanager
    def demand(self) -> Iterator[None]:
        """Around a request that a guest waits for."""
        self._demands += 1
        self._clear.clear()
        try:
            yield
        finally:
            self._demands -= 1
            if not self._demands:
                self._clear.set()

    async def give_way(self) -> None:
        """Return when no guest waits for a request, or when it was waited for long enough."""
        if self._clear.is_set():
            return
        self.gave_way += 1
        try:
            async with asyncio.timeout(self._give_way_s):
                await self._clear.wait()
        except TimeoutError:
            return
