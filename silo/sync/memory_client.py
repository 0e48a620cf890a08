"""One host's way to a `silo.sync.memory_store.MemoryStore`: the port, and the journey there and back.

The client keeps the rules of the port (keys, ranges, closing), lets every operation travel, and lets it suffer
what the store has decided. What operations do when they arrive is the store's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from silo.abc import Buffer, ObjectInfo, ObjectStore, StoredObject
from silo.errors import ClosedError, InvalidRequestError, InvariantError, UnavailableError
from silo.sync.store_faults import Fault, FaultKind, Operation, Outcome, Verb
from silo.sync.store_keys import check_key, check_prefix, check_range, clip_range

if TYPE_CHECKING:
    from silo.sync.memory_store import MemoryStore

__all__ = ["MemoryClient", "flip"]

T = TypeVar("T")


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
        return await self._put(Verb.PUT, key, data, None, self.store.write_step)

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        check_key(key)
        return await self._put(Verb.PUT_IF, key, data, match, self.store.swap_step)

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        check_key(key)
        check_range(start, length)
        operation = self._operation(Verb.GET, (key,))

        def act() -> StoredObject | None:
            found = self.store.objects.get(key)
            if found is None:
                return None
            data = found.data[start : start + clip_range(start, length, len(found.data))]
            operation.size = len(data)
            corrupt = operation.fault is FaultKind.CORRUPT
            return StoredObject(flip(data) if corrupt else data, found.etag, len(found.data))

        return await self._perform(operation, act)

    async def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        return await self._perform(self._operation(Verb.HEAD, (key,)), partial(self._info, key))

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
        operation = self._operation(Verb.DELETE, tuple(keys))
        await self._perform(operation, partial(self.store.delete_step, operation))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)

        def act() -> list[ObjectInfo]:
            keys = sorted(key for key in self.store.objects if key.startswith(prefix))
            return [info for key in keys if (info := self._info(key)) is not None]

        for info in await self._perform(self._operation(Verb.LIST, (prefix,)), act):
            yield info

    async def aclose(self) -> None:
        self._closed = self._closed or "the store is closed"

    def _info(self, key: str) -> ObjectInfo | None:
        found = self.store.objects.get(key)
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
            return write(operation, flip(body) if operation.fault is FaultKind.CORRUPT else body)

        result = await self._perform(operation, act)
        if b"".join(data) != body:
            raise InvariantError(f"the buffers of {operation} changed while they were being sent")
        return result

    async def _perform(self, operation: Operation, act: Callable[[], T]) -> T:
        fault = self.store.admit(operation)
        await self._go(operation, fault, act)
        kind = fault.kind if fault else None
        if kind is FaultKind.FAIL or self._cut_off:
            raise self._failed(operation, Outcome.FAILED, "the store did not answer")
        if kind is FaultKind.SLOW_DOWN:
            raise self._failed(operation, Outcome.FAILED, "the store asks to slow down (503)")
        if kind is FaultKind.REFUSE:
            operation.outcome = Outcome.FAILED
            raise InvalidRequestError(f"access denied: {operation.verb.value} {operation.key}")
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
                self.store.land_after(operation, act, rest_s)
            raise self._failed(operation, Outcome.FAILED, "the store did not answer in time")

    def _abandon(self, operation: Operation) -> None:
        act = self._coming.pop(operation, None)
        if act is None:
            return  # we were killed, which has seen to it
        operation.outcome = Outcome.ABANDONED
        lands_s = self.store.lands(operation) if operation.mutates and self.store.lands else None
        if lands_s is not None:
            self.store.land_after(operation, act, lands_s)

    @property
    def _cut_off(self) -> bool:
        return self.offline or self.store.offline

    @staticmethod
    def _failed(operation: Operation, outcome: Outcome, message: str) -> UnavailableError:
        if operation.outcome is not Outcome.REFUSED:
            operation.outcome = outcome
        return UnavailableError(f"{message}: {operation.verb.value} {operation.key}")

    async def _hold(self, operation: Operation) -> None:
        future = self.store.hold(operation)
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


def flip(data: bytes, offset: int | None = None) -> bytes:
    """``data`` with one bit flipped; empty data stays empty."""
    if not data:
        return data
    at = len(data) // 2 if offset is None else offset
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
