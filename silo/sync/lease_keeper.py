"""Keeps a writer's lease: looks at the head when no commit has for a while, and stalls the guest when it cannot.

While the gate is closed for a handover nobody is served, so nothing is renewed either: the head may name the other
host by then, and what that means is the migration's business. With a lease of T an idle group costs three small GETs
in T; a group that commits more often costs none.
"""

from __future__ import annotations

import asyncio
import logging

from silo.abc import Clock
from silo.errors import CorruptionError, FencedError
from silo.gate import Gate
from silo.sync.lease import Lease, LeaseState
from silo.sync.register import Register
from silo.sync.retry import STORE_TROUBLE

__all__ = ["LeaseKeeper"]

logger = logging.getLogger(__name__)

RETRY_S = 0.5
"""Between two attempts to look at the head, while the lease is running out or has."""


class LeaseKeeper:
    """See the module. From its making on the gate lets nobody pass without a lease; `run` is a task of the owner's."""

    def __init__(self, group: str, lease: Lease, register: Register, gate: Gate, clock: Clock) -> None:
        self._group = group
        self._lease = lease
        self._register = register
        self._gate = gate
        self._clock = clock
        gate.may_serve = self.may_serve
        lease.on_confirmed = gate.look

    def may_serve(self) -> bool:
        """Whether the lease still holds."""
        return self._lease.state(self._clock.boottime()) is LeaseState.HOLDING

    async def run(self) -> None:
        """Until cancelled, or until the group belongs to somebody else: then the gate has failed."""
        while self._gate.error is None:
            delay_s = self._lease.renew_at - self._clock.boottime()
            if self._gate.is_closed or delay_s > 0:
                # Short steps: the lease runs on while the machine is suspended, and the loop's clock does not.
                await asyncio.sleep(min(max(delay_s, RETRY_S), self._lease.lease_s / 4))
            elif not await self._renew():
                await asyncio.sleep(min(RETRY_S, self._lease.lease_s / 4))
            self._gate.look()

    async def _renew(self) -> bool:
        """Look at the head once. False when that did not help."""
        left_s = self._lease.valid_until - self._clock.boottime()
        try:
            # Not beyond the lease: whoever hangs there must not keep the guest from being stalled in time.
            async with asyncio.timeout(left_s if left_s > 0 else self._lease.lease_s):
                await self._register.renew()
        except TimeoutError:
            return False
        except FencedError as error:
            if self._gate.is_closed:
                return False
            self._gate.fail(error)
            logger.warning("group %s: %s", self._group, error)
        except (CorruptionError, *STORE_TROUBLE) as error:
            if left_s <= 0:
                logger.info("group %s waits for its lease: %s", self._group, error)
            return False
        return True
