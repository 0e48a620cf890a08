"""The hooks of a workload as a migration calls them: with deadlines, in turn, and with the time they took.

A migration (`silo.p2p`) says what is to happen and when; this module turns each of its requests into one call of
a hook. It adds what every call needs: an absolute deadline, the `silo.abc.Step` with the devices' addresses, the
check of what came back, and an error that names the hook. The order of the hooks is the migration's business:

* source: ``quiesce``, ``suspend``, ``flush``, ``capture``, before the gate closes, so that a VM manager may
  still write and flush; and at the very end ``fence``;
* target: ``prepare`` early, ``resume`` and ``unquiesce`` after the claim;
* source, after a failure before the claim: ``unsuspend``, ``unquiesce``, whichever hooks had been called; target
  then: ``fence``, when it was prepared.

Hooks that the workload does not have, or that its `silo.abc.Capabilities` rule out, take no time and always
succeed. Repeating a call calls the hook again: being idempotent is the workload's part of the contract.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from silo.abc import STATE_SIZE_MAX, Capabilities, Clock, Health, Role, Step, Workload
from silo.errors import CapacityError, InvalidRequestError, UnavailableError
from silo.hooks.calls import HookCalls
from silo.hooks.inprocess import NullWorkload

__all__ = ["TIMEOUT_S", "WorkloadRunner"]

log = logging.getLogger(__name__)


TIMEOUT_S: Final = 30.0
"""For each hook. It ends what hangs; what is too slow for a migration is for the migration's deadline to say."""


def _nowhere() -> Mapping[str, str]:
    return {}


_BEFORE_CLAIM = frozenset({"prepare", "quiesce", "suspend", "flush", "capture"})
"""Hooks that are worth nothing after the migration's own deadline. All others must be done even then."""


class WorkloadRunner:
    """Calls the hooks of one workload, on one side of one migration. Satisfies ``silo.p2p.ports.Guest``.

    ``devices`` is asked at each call for the addresses at which the guest reaches its volumes. All runners of a
    workload come from one by `for_migration`, so that no two hooks of it ever run at once. Concurrent calls are
    allowed, and take turns. Every method raises `UnavailableError` when its hook failed, was overdue, or did not
    get its turn because an overdue one has not ended; the hook may then have had its effect or not, and may
    be called again. A cancelled call leaves no hook running, except one that is a plain function and overdue.
    """

    def __init__(
        self,
        workload: Workload | None,
        clock: Clock,
        *,
        group: str,
        role: Role = Role.SOURCE,
        devices: Callable[[], Mapping[str, str]] = _nowhere,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.workload: Workload = NullWorkload() if workload is None else workload
        if timeout_s <= 0:
            raise InvalidRequestError(f"the timeout of a workload's hooks must be positive, not {timeout_s}")
        self.group = group
        self.role = role
        self.spent_s = 0.0
        """Seconds that hooks have taken so far, with their waiting for one another, whatever their outcome."""
        self.took_s: dict[str, float] = {}
        """The same by hook, in the order of their first calls."""
        self._clock = clock
        self._devices = devices
        self._timeout_s = timeout_s
        self._deadline = math.inf
        self._calls = HookCalls(f"the workload of {group}", clock)

    def for_migration(self, role: Role, *, deadline: float = math.inf) -> WorkloadRunner:
        """A runner of the same workload for one side of one migration; it counts its time from zero.

        No hook that serves the handover may run past ``deadline`` (`Clock.monotonic` time). Those that come after
        the claim, or undo what was done, keep their own time.
        """
        runner = WorkloadRunner(
            self.workload,
            self._clock,
            group=self.group,
            role=role,
            devices=self._devices,
            timeout_s=self._timeout_s,
        )
        runner._deadline = deadline
        runner._calls = self._calls
        return runner

    def capabilities(self) -> Capabilities:
        """What the workload says it can do. `UnavailableError` when it fails to say."""
        try:
            return self.workload.caps()
        except Exception as error:
            raise UnavailableError(f"caps of the workload of {self.group} failed: {error}") from error

    async def prepare(self) -> None:
        """Let the workload get ready, on either side."""
        await self._call("prepare")

    async def quiesce(self) -> None:
        """Bring the guest's file systems to rest, if the workload can do that."""
        if self.capabilities().quiesce:
            await self._call("quiesce")

    async def suspend(self) -> None:
        """Stop the guest. When this raises, it may be suspended all the same: undo with `unsuspend`."""
        await self._call("suspend")

    async def flush(self) -> None:
        """Push what is cached outside of Silo into the devices."""
        await self._call("flush")

    async def capture(self) -> bytes:
        """The opaque state for `resume`. Besides the errors of all methods:

        `InvalidRequestError` when the hook returned something other than bytes, `CapacityError` when it
        returned more than `STATE_SIZE_MAX`.
        """
        if not self.capabilities().captures_state:
            return b""
        state = await self._call("capture")
        if not isinstance(state, bytes | bytearray | memoryview):
            raise InvalidRequestError(
                f"hook capture of the workload of {self.group} returned {type(state).__name__}, not bytes"
            )
        if (size := memoryview(state).nbytes) > STATE_SIZE_MAX:
            raise CapacityError(
                f"hook capture of the workload of {self.group} returned {size} bytes, {STATE_SIZE_MAX} can travel",
                hint="put the guest's memory on a volume of the group, and capture only the state of its devices",
            )
        return bytes(state)

    async def resume(self, state: bytes) -> None:
        """Target, after the claim: let the guest run from ``state`` and the devices."""
        await self._call("resume", state)

    async def unquiesce(self) -> None:
        """Undo `quiesce`, on whichever side the guest runs now."""
        if self.capabilities().quiesce:
            await self._call("unquiesce")

    async def unsuspend(self) -> None:
        """Source: let the guest run on here. A workload that cannot do that is reported in the log, once per call."""
        if self.capabilities().can_unsuspend:
            await self._call("unsuspend")
        else:
            log.error("the workload of %s cannot run on after its suspension: start it again", self.group)

    async def fence(self) -> None:
        """The guest runs on the other host, now or still: make sure that it can never run here."""
        await self._call("fence")

    async def probe(self) -> Health:
        """Is the guest really running? `InvalidRequestError` when the hook returned something else."""
        health = await self._call("probe")
        if not isinstance(health, Health):
            raise InvalidRequestError(
                f"hook probe of the workload of {self.group} returned {type(health).__name__}, not a Health"
            )
        return health

    async def _call(self, name: str, *args: Any) -> Any:
        started = self._clock.monotonic()
        deadline = started + self._timeout_s
        if name in _BEFORE_CLAIM:
            deadline = min(deadline, self._deadline)
        step = Step(role=self.role, deadline=deadline, devices=dict(self._devices()), group=self.group)
        hook = getattr(self.workload, name)
        if getattr(hook, "__func__", None) is getattr(Workload, name):
            return hook(step, *args)  # the port's own: it only returns
        try:
            return await self._calls.call(f"hook {name}", deadline, hook, step, *args)
        finally:
            took_s = self._clock.monotonic() - started
            self.spent_s += took_s
            self.took_s[name] = self.took_s.get(name, 0.0) + took_s
