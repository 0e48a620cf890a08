"""The gate of a group: whether guest requests may reach the devices.

::

    OPEN ──close_and_drain──► CLOSED ──reopen──► OPEN
      └───────────fail(error)──────┴──► FAILED          for ever: every request ends with the error

One gate serves all volumes of a group, so that they stop at one instant. ``is_open`` is a plain attribute for the
synchronous path. An asynchronous write of the guest holds a *device phase* around the device call and nothing else:
it checks the gate again, with no await between, before it enters the phase. So closing the gate needs to wait
only for device phases, and a request that waits for hydration when the gate closes will wait at the gate
afterwards. Fills and punches go on behind a closed gate: they do not change what a volume reads as.

While a writer has a lease (`silo.sync.lease_keeper`) the gate is *stalled*, like closed, whenever ``may_serve`` denies
it. Whoever serves a batch of requests asks once for the batch (`look`); asynchronous ones ask before each device phase.
A stalled gate opens by itself when the lease is confirmed, a closed one does not.

A closed gate stops reads too: after a handover another host may have newer content.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from silo.errors import SiloError

__all__ = ["Gate"]


class Gate:
    """See the module. Not thread-safe: it belongs to the group's event loop."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.is_open = is_open
        self.error: SiloError | None = None
        self.is_closed = not is_open
        """Closed for a handover, and not merely stalled."""
        self.may_serve: Callable[[], bool] | None = None
        """Whether the writer's lease holds; ``None`` without leases."""
        self._phases = 0
        self._opened = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        if is_open:
            self._opened.set()

    async def wait_open(self) -> None:
        """Return when the gate is open; raise the gate's error when it has failed.

        No deadline: how long a switchover may take is the migration's decision, which ends in `reopen` or `fail`.
        """
        self.look()
        while not self.is_open:
            self.check()
            await self._opened.wait()
            self.look()

    def look(self) -> None:
        """Stall the gate if the lease has ended, and open it again if that was all that kept it."""
        if self.may_serve is None or self.is_closed or self.error is not None:
            return
        self.is_open = self.may_serve()
        if self.is_open:
            self._opened.set()
        else:
            self._opened.clear()

    def check(self) -> None:
        """Raise the gate's error when it has failed. A closed gate passes: it may open again."""
        if self.error is not None:
            raise self.error.with_traceback(None)  # else each request would add its own to the shared one

    @contextmanager
    def device_phase(self) -> Iterator[None]:
        """Around one asynchronous write of the guest to a device. Enter without an await after seeing the gate open."""
        self._phases += 1
        self._drained.clear()
        try:
            yield
        finally:
            self._phases -= 1
            if self._phases == 0:
                self._drained.set()

    async def close_and_drain(self) -> None:
        """Admit nothing more, and return when no device phase is left. Twice is harmless.

        After a cancellation the gate stays closed; the caller decides what follows. The wait is bounded by the
        devices' own calls, which cannot be shortened.
        """
        self.is_open = False
        self.is_closed = True
        self._opened.clear()
        await self._drained.wait()

    def reopen(self) -> None:
        """Admit requests again, when the lease holds. A failed gate stays failed."""
        if self.error is None:
            self.is_open = True
            self.is_closed = False
            self._opened.set()
            self.look()

    def fail(self, error: SiloError) -> None:
        """End every waiting and every later request with ``error``. The first error stays."""
        if self.error is None:
            self.error = error
        self.is_open = False
        self._opened.set()
