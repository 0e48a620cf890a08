"""An object store in memory that can be told to misbehave: for tests, for the simulation, for trying things out.

A `MemoryStore` is the far side, the thing that outlives every host. Hosts reach it through handles made by
`MemoryStore.client`, each of which is an `silo.abc.ObjectStore`. Killing a handle is how a simulated crash
looks from the store: whatever was on its way is dropped, or lands later when the store's ``lands`` function
says so, which is what a real network does with a PUT whose sender has died. (A `SimulatedProcess` that is killed
takes its timers with it; kill its handles too, and what lands later does so as nobody's.)

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
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TypeVar

import attrs

from silo.abc import Buffer, Clock, ObjectInfo, ObjectStore, StoredObject
from silo.errors import ClosedError, InvalidRequestError, InvariantError, UnavailableError
from silo.sync.store_faults import Fault, FaultKind, Operation, Outcome, Rule, Verb
from silo.sync.store_keys import check_key, check_prefix, check_range, clip_range

__all__ = ["MemoryClient", "MemoryStore"]

T = TypeVar("T")


@attrs.frozen
class _Object:
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
        self._objects: dict[str, _Object] = {}
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
        return {key: self._objects[key].data for key in sorted(self._objects)}

    def clone(self) -> MemoryStore:
        """A store of its own with the same objects, without faults, latency or log: something to restore from."""
        twin = MemoryStore(self.clock, timeout_s=self.timeout_s)
        twin._objects = dict(self._objects)
        return twin

    def place(self, key: str, data: bytes) -> None:
        """Put an object behind everybody's back, such as an old head that an operator rolled back to."""
        check_key(key)
        self._write(key, data)

    def remove(self, key: str) -> None:
        """Delete an object behind everybody's back. KeyError when there is none."""
        del self._objects[key]

    def corrupt(self, key: str, offset: int | None = None) -> None:
        """Flip one bit of a stored object, in its middle by default; the ETag stays, as on a rotting disk."""
        found = self._objects[key]
        self._objects[key] = attrs.evolve(found, data=_flip(found.data, offset))

    # ---- what operations do when they arrive; each is one step

    def _write(self, key: str, data: bytes) -> str:
        etag = hashlib.blake2b(
            data, digest_size=16
        ).hexdigest()  # of the content, as S3's is: equal bodies are equal
        self._objects[key] = _Object(data, etag, self.clock.wall())
        return etag

    def _put(self, operation: Operation, data: bytes) -> str:
        etag = self._write(operation.key, data)
        self._mutated(operation)
        return etag

    def _put_if(self, operation: Operation, data: bytes) -> str | None:
        found = self._objects.get(operation.key)
        if (found.etag if found else None) != operation.match:
            operation.outcome = Outcome.REFUSED
            return None
        return self._put(operation, data)

    def _delete(self, operation: Operation) -> None:
        removed = [self._objects.pop(key) for key in operation.keys if key in self._objects]
        if removed:
            self._mutated(operation)

    def _mutated(self, operation: Operation) -> None:
        for callback in self.on_mutation:
            callback(operation)

    # ---- faults

    def _admit(self, operation: Operation) -> Fault | None:
        self.log.append(operation)
        fault = next((rule.fault for rule in self.rules if rule.strikes(operation)), None)
        if fault is None and self.choose is not None:
            fault = self.choose(operation)
        operation.fault = fault.kind if fault else None
        return fault

    def _land_after(self, operation: Operation, act: Callable[[], object], delay_s: float | None) -> None:
        landing = _Landing(operation, act)
        self._late.append(landing)
        if delay_s is not None:
            # In a context of its own, so that a simulated process that dies meanwhile does not take it along.
            context = contextvars.Context()
            loop = asyncio.get_running_loop()
            landing.timer = loop.call_later(delay_s, self._land, landing, context=context)

    def _land(self, landing: _Landing) -> None:
        self._late.remove(landing)
        if landing.timer is not None:
            landing.timer.cancel()
        landing.operation.outcome = Outcome.LATE
        landing.act()
        if landing.operation.outcome is Outcome.REFUSED:
            landing.operation.outcome = Outcome.LATE_REFUSED


class MemoryClient(ObjectStore):
    """One host's handle on a `MemoryStore`."""

    def __init__(self, store: MemoryStore, name: str) -> None:
        self.store = store
        self.name = name
        self.url = "memory:"
        self.offline = False
        """As `MemoryStore.offline`, for this handle only: a host that is cut off while others are not."""
        self._closed = ""
        self._waits: set[asyncio.Future[None]] = set()
        self._coming: dict[Operation, Callable[[], object]] = {}
        """Operations on their way to the store, and what each will do there."""

    def kill(self) -> None:
        """Die as a host does: operations under way end with `ClosedError`, mutations not yet applied are dropped
        unless the store's ``lands`` says that they land later. What was applied stays applied.
        """
        self._closed = "the store's client was killed"
        for operation in list(self._coming):
            self._abandon(operation)
        for wait in self._waits:
            if not wait.done():
                wait.set_exception(ClosedError(self._closed))

    async def put(self, key: str, data: Sequence[Buffer]) -> str:
        check_key(key)
        return await self._put(Verb.PUT, key, data, None, self.store._put)

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        check_key(key)
        return await self._put(Verb.PUT_IF, key, data, match, self.store._put_if)

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        check_key(key)
        check_range(start, length)
        operation = self._operation(Verb.GET, (key,))

        def act() -> StoredObject | None:
            found = self.store._objects.get(key)
            if found is None:
                return None
            data = found.data[start : start + clip_range(start, length, len(found.data))]
            operation.size = len(data)
            corrupt = operation.fault is FaultKind.CORRUPT
            return StoredObject(_flip(data) if corrupt else data, found.etag, len(found.data))

        return await self._perform(operation, act)

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        return await self._perform(self._operation(Verb.HEAD, (key,)), partial(self._info, key))

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        operation = self._operation(Verb.DELETE, tuple(keys))
        await self._perform(operation, partial(self.store._delete, operation))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)

        def act() -> list[ObjectInfo]:
            keys = sorted(key for key in self.store._objects if key.startswith(prefix))
            return [info for key in keys if (info := self._info(key)) is not None]

        for info in await self._perform(self._operation(Verb.LIST, (prefix,)), act):
            yield info

    async def aclose(self) -> None:
        self._closed = self._closed or "the store is closed"

    def _info(self, key: str) -> ObjectInfo | None:
        found = self.store._objects.get(key)
        return None if found is None else ObjectInfo(key, len(found.data), found.etag, found.modified)

    def _operation(
        self, verb: Verb, keys: tuple[str, ...], size: int = 0, match: str | None = None
    ) -> Operation:
        if self._closed:
            raise ClosedError(self._closed)
        started = self.store.clock.monotonic()
        return Operation(len(self.store.log), self.name, verb, keys, size, match, started)

    async def _put(
        self,
        verb: Verb,
        key: str,
        data: Sequence[Buffer],
        match: str | None,
        write: Callable[[Operation, bytes], T],
    ) -> T:
        body = b"".join(data)
        operation = self._operation(verb, (key,), len(body), match)

        def act() -> T:
            return write(operation, _flip(body) if operation.fault is FaultKind.CORRUPT else body)

        result = await self._perform(operation, act)
        if b"".join(data) != body:
            raise InvariantError(f"the buffers of {operation} changed while they were being sent")
        return result

    async def _perform(self, operation: Operation, act: Callable[[], T]) -> T:
        fault = self.store._admit(operation)
        await self._go(operation, fault, act)
        kind = fault.kind if fault else None
        if kind is FaultKind.FAIL or self._cut_off:
            raise self._failed(operation, Outcome.FAILED, "the store did not answer")
        if kind is FaultKind.SLOW_DOWN:
            raise self._failed(operation, Outcome.FAILED, "the store asks to slow down (503)")
        operation.outcome = Outcome.DONE
        try:
            result = act()
        except InvalidRequestError:
            operation.outcome = Outcome.REFUSED
            raise
        try:
            await self._pause(self.store.latency_s / 2)
        except (asyncio.CancelledError, ClosedError):
            operation.outcome = Outcome.LOST if operation.outcome is Outcome.DONE else operation.outcome
            raise
        if kind is FaultKind.LOSE_RESPONSE or self._cut_off:
            raise self._failed(operation, Outcome.LOST, "the store's answer was lost")
        return result

    async def _go(self, operation: Operation, fault: Fault | None, act: Callable[[], object]) -> None:
        """The way to the store. Raises when the operation does not arrive, or not while its caller waits."""
        kind = fault.kind if fault else None
        delay_s = (fault.delay_s or 0.0) if fault and kind is FaultKind.DELAY else 0.0
        late = kind is FaultKind.LATE or delay_s > self.store.timeout_s
        self._coming[operation] = act
        try:
            await self._pause(self.store.latency_s / 2 + min(delay_s, self.store.timeout_s))
            if kind is FaultKind.HOLD:
                await self._hold(operation)
        except (asyncio.CancelledError, ClosedError):
            self._abandon(operation)
            raise
        del self._coming[operation]
        if late and fault is not None:
            rest_s = fault.delay_s if kind is FaultKind.LATE else delay_s - self.store.timeout_s
            if operation.mutates:
                self.store._land_after(operation, act, rest_s)
            raise self._failed(operation, Outcome.FAILED, "the store did not answer in time")

    def _abandon(self, operation: Operation) -> None:
        act = self._coming.pop(operation, None)
        if act is None:
            return  # we were killed, which has seen to it
        operation.outcome = Outcome.ABANDONED
        lands_s = self.store.lands(operation) if operation.mutates and self.store.lands else None
        if lands_s is not None:
            self.store._land_after(operation, act, lands_s)

    @property
    def _cut_off(self) -> bool:
        return self.offline or self.store.offline

    @staticmethod
    def _failed(operation: Operation, outcome: Outcome, message: str) -> UnavailableError:
        if operation.outcome is not Outcome.REFUSED:
            operation.outcome = outcome
        return UnavailableError(f"{message}: {operation.verb.value} {operation.key}")

    async def _hold(self, operation: Operation) -> None:
        future = asyncio.get_running_loop().create_future()
        self.store.held[operation] = future
        self.store._held_more.set()
        try:
            await self._until(future)  # no deadline: the test that holds it lets it go
        finally:
            del self.store.held[operation]

    async def _pause(self, delay_s: float) -> None:
        if delay_s <= 0:
            await asyncio.sleep(0)
            if self._closed:
                raise ClosedError(self._closed)
            return
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        timer = loop.call_later(delay_s, _resolve, future)
        try:
            await self._until(future)
        finally:
            timer.cancel()

    async def _until(self, future: asyncio.Future[None]) -> None:
        self._waits.add(future)
        try:
            await future
        finally:
            self._waits.discard(future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _flip(data: bytes, offset: int | None = None) -> bytes:
    """``data`` with one bit flipped; empty data stays empty."""
    if not data:
        return data
    at = len(data) // 2 if offset is None else offset
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
