"""Waiting for something to change, without saying beforehand what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Signal"]


class Signal:
    """Wakes everyone who waits, each time. Unlike a condition it needs no lock: there is one loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Something has changed."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until the condition holds, looking again at each change. The caller brings the deadline."""
        while not true():
            await self._event.wait()
