"""An object store in memory that can be told to misbehave: for tests, for the simulation, for trying things out.

A `MemoryStore` is the far side, the thing that outlives every host. Hosts reach it through handles made by
`MemoryStore.client`, each of which is a `silo.abc.ObjectStore` (`silo.sync.memory_client`). Killing a handle is
how a simulated crash looks from the store: whatever was on its way is dropped, or lands later when the store's
``lands`` function says so, which is what a real network does with a PUT whose sender has died. (A
`SimulatedProcess` that is killed takes its timers with it; kill its handles too, and what lands later does so
as nobody's.)

An operation travels half of ``latency_s`` to the store, acts there in one step, and travels back. It always
gives way to other tasks at least once. Time is the event loop's and the given clock's; nothing is random, so a
run repeats exactly. Faults come from rules (see `silo.sync.store_faults`) or from the function ``choose``.

After every applied mutation the callbacks in ``on_mutation`` run, with the store already changed: the
simulation's oracle looks there at what a restorer would find. ``log`` holds every operation with what really
became of it. One event loop; no locks, because nothing awaits between looking and changing.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
from collections.abc import Callable

import attrs

from silo.abc import Clock
from silo.sync.memory_client import MemoryClient, flip
from silo.sync.store_faults import Fault, FaultKind, Operation, Outcome, Rule, Verb
from silo.sync.store_keys import check_key

__all__ = ["MemoryStore"]


@attrs.frozen
class MemoryObject:
    """An object as it is stored."""

    data: bytes
    etag: str
    modified: float


@attrs.define(eq=False)
class _Landing:
    """A mutation whose caller has already been told of a failure, or has died."""

    operation: Operation
    act: Callable[[], object]
    timer: asyncio.TimerHandle | None = None


class MemoryStore:
    """The far side: objects, the log of operations, and the faults to come. Make handles with `client`."""

    def __init__(self, clock: Clock, *, latency_s: float = 0.0, timeout_s: float = 30.0) -> None:
        self.clock = clock
        self.latency_s = latency_s
        self.timeout_s = timeout_s
        self.offline = False
        """While true nothing reaches the store, and answers on their way back are lost."""
        self.log: list[Operation] = []
        self.rules: list[Rule] = []
        self.choose: Callable[[Operation], Fault | None] | None = None
        """Asked for a fault when no rule strikes."""
        self.lands: Callable[[Operation], float | None] | None = None
        """Asked about a mutation whose caller was cancelled or killed on the way: seconds until it lands, or None."""
        self.on_mutation: list[Callable[[Operation], None]] = []
        self.held: dict[Operation, asyncio.Future[None]] = {}
        self.objects: dict[str, MemoryObject] = {}
        self._late: list[_Landing] = []
        self._held_more = asyncio.Event()

    def client(self, name: str = "client") -> MemoryClient:
        """A new handle; ``name`` appears in the log and in rules."""
        return MemoryClient(self, name)

    # ---- the script

    def inject(
        self,
        kind: FaultKind,
        *verbs: Verb,
        key: str = "*",
        client: str = "*",
        skip: int = 0,
        times: int | None = 1,
        delay_s: float | None = None,
    ) -> Rule:
        """Add a rule (see `Rule`; no verb means every verb) and return it, so that it can be taken back."""
        rule = Rule(Fault(kind, delay_s), frozenset(verbs or Verb), key, client, skip, times)
        self.rules.append(rule)
        return rule

    async def wait_held(self, count: int = 1) -> None:
        """Wait until ``count`` operations are held. The caller brings the deadline."""
        while len(self.held) < count:
            self._held_more.clear()
            await self._held_more.wait()

    def release_held(self) -> None:
        """Let every operation go that a HOLD keeps on its way; later ones are held again while the rule strikes."""
        for future in self.held.values():
            if not future.done():
                future.set_result(None)

    def land_late(self) -> list[Operation]:
        """Land every late mutation now, oldest first, whatever its timer says. Returns them."""
        landings = list(self._late)
        for landing in landings:
            self._land(landing)
        return [landing.operation for landing in landings]

    def drop_late(self) -> None:
        """Forget every late mutation: it never reaches the store."""
        for landing in self._late:
            if landing.timer is not None:
                landing.timer.cancel()
        self._late.clear()

    # ---- the operator's hands, and the oracle's eyes; none of these is an operation

    def snapshot(self) -> dict[str, bytes]:
        """Every object as it is now. Cheap: bodies are shared, and never change."""
        return {key: self.objects[key].data for key in sorted(self.objects)}

    def clone(self) -> MemoryStore:
        """A store of its own with the same objects, without faults, latency or log: something to restore from."""
        twin = MemoryStore(self.clock, timeout_s=self.timeout_s)
        twin.objects = dict(self.objects)
        return twin

    def place(self, key: str, data: bytes) -> None:
        """Put an object behind everybody's back, such as an old head that an operator rolled back to."""
        check_key(key)
        self._write(key, data)

    def remove(self, key: str) -> None:
        """Delete an object behind everybody's back. KeyError when there is none."""
        del self.objects[key]

    def corrupt(self, key: str, offset: int | None = None) -> None:
        """Flip one bit of a stored object, in its middle by default; the ETag stays, as on a rotting disk."""
        found = self.objects[key]
        self.objects[key] = attrs.evolve(found, data=flip(found.data, offset))

    # ---- for the clients: what operations do when they arrive, each in one step

    def _write(self, key: str, data: bytes) -> str:
        etag = hashlib.blake2b(
            data, digest_size=16
        ).hexdigest()  # of the content, as S3's is: equal bodies are equal
        self.objects[key] = MemoryObject(data, etag, self.clock.wall())
        return etag

    def write_step(self, operation: Operation, data: bytes) -> str:
        """Write an object; its ETag."""
        etag = self._write(operation.key, data)
        self._mutated(operation)
        return etag

    def swap_step(self, operation: Operation, data: bytes) -> str | None:
        """Write an object if the operation's condition holds."""
        found = self.objects.get(operation.key)
        if (found.etag if found else None) != operation.match:
            operation.outcome = Outcome.REFUSED
            return None
        return self.write_step(operation, data)

    def delete_step(self, operation: Operation) -> None:
        """Delete the operation's objects."""
        removed = [self.objects.pop(key) for key in operation.keys if key in self.objects]
        if removed:
            self._mutated(operation)

    def _mutated(self, operation: Operation) -> None:
        for callback in self.on_mutation:
            callback(operation)

    # ---- for the clients: faults

    def admit(self, operation: Operation) -> Fault | None:
        """Log an operation that sets out, and decide what it suffers."""
        self.log.append(operation)
        fault = next((rule.fault for rule in self.rules if rule.strikes(operation)), None)
        if fault is None and self.choose is not None:
            fault = self.choose(operation)
        operation.fault = fault.kind if fault else None
        return fault

    def land_after(self, operation: Operation, act: Callable[[], object], delay_s: float | None) -> None:
        """Let a mutation that nobody waits for any more arrive later; when the test says so if that is None."""
        landing = _Landing(operation, act)
        self._late.append(landing)
        if delay_s is not None:
            # In a context of its own, so that a simulated process that dies meanwhile does not take it along.
            context = contextvars.Context()
            loop = asyncio.get_running_loop()
            landing.timer = loop.call_later(delay_s, self._land, landing, context=context)

    def hold(self, operation: Operation) -> asyncio.Future[None]:
        """Keep an operation on its way; the client waits for the future and then forgets it in ``held``."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.held[operation] = future
        self._held_more.set()
        return future

    def _land(self, landing: _Landing) -> None:
        self._late.remove(landing)
        if landing.timer is not None:
            landing.timer.cancel()
        landing.operation.outcome = Outcome.LATE
        landing.act()
        if landing.operation.outcome is Outcome.REFUSED:
            landing.operation.outcome = Outcome.LATE_REFUSED
