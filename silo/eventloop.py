"""An event loop that looks again before it sleeps, when somebody has reason to expect more at once.

A process that waits for its next request sleeps, and being woken costs more than the request: tens of microseconds
on a virtual machine, for the client too, who must do the waking. A client that sends one request at a time pays
that on every one. So whoever has just answered such a client says `AttentiveLoop.expect_soon`, and the loop then asks
the kernel again and again for up to `ATTENTION_S` before it sleeps.

This is not a busy loop. Nobody is kept waiting: the loop only does it when it has nothing else to do, and any event
and any timer ends it. An idle process sleeps. And attention that was for nothing makes the loop inattentive for a
while, twice as long each time, so that a client that thinks, or a machine that has other work for its cores, costs
next to nothing. On a machine with a single core waiting would only keep the client from running; there it is off.

On any other loop everything works as well, with a little more latency: `expects_soon` then does nothing.
"""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Callable
from typing import Final

from silo.abc import Clock
from silo.clock import SystemClock

__all__ = ["ATTENTION_S", "AttentiveLoop", "AttentiveSelector", "expects_soon"]

ATTENTION_S: Final = 60e-6
"""About what a client in the same machine needs to take an answer and send the next request."""
_INATTENTION_MAX: Final = 255
"""So many chances at most are let pass after attention has been for nothing again and again."""

Ready = list[tuple[selectors.SelectorKey, int]]


class AttentiveSelector(selectors.EpollSelector):
    """The loop's own view of what is ready; see the module."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._now = clock.monotonic
        self._expected = False
        self._skips = 0
        """Chances that will be let pass."""
        self._penalty = 0
        """How many the last failure has cost."""

    def expect_soon(self) -> None:
        """The next `select` may look for up to `ATTENTION_S` before it sleeps."""
        if self._skips:
            self._skips -= 1
        else:
            self._expected = True

    def select(self, timeout: float | None = None) -> Ready:
        """As any selector's: what is ready, at the latest after ``timeout`` seconds."""
        if self._expected:
            self._expected = False
            if timeout is None or timeout > ATTENTION_S:
                ready = self._look()
                if ready:
                    return ready
        return super().select(timeout)

    def _look(self) -> Ready:
        look, now = super().select, self._now
        deadline = now() + ATTENTION_S
        while not (ready := look(0)):
            if now() >= deadline:
                self._skips = self._penalty = min(2 * self._penalty + 1, _INATTENTION_MAX)
                return ready
        self._penalty = 0
        return ready


class AttentiveLoop(asyncio.SelectorEventLoop):
    """See the module. Made to be a ``loop_factory``."""

    def __init__(self, clock: Clock | None = None) -> None:
        selector = AttentiveSelector(clock or SystemClock())
        super().__init__(selector)
        self.expect_soon: Callable[[], None] = selector.expect_soon
        if len(os.sched_getaffinity(0)) == 1:
            self.expect_soon = _nothing


def expects_soon(loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """What to call on this loop when more is about to come; cheap enough for every request."""
    return loop.expect_soon if isinstance(loop, AttentiveLoop) else _nothing


def _nothing() -> None:
    """On this loop, or this machine, there is no point in waiting awake."""
