"""Reading parts of objects, with two lanes and some patience.

A guest that waits must not stand in a queue behind hydration, so its requests have *lanes* of their own. They are
also tried again when the store does not answer, up to a limit; background requests fail at once, because
whoever made them has time and its own idea of when to come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from silo.abc import Buffer, Clock, ObjectStore
from silo.errors import CorruptionError, InvalidRequestError, UnavailableError
from silo.sync.cipher import KeyRing
from silo.sync.codec import digest_of
from silo.sync.head import PartRef
from silo.sync.retry import Backoff, bounded
from silo.sync.settings import FetchSettings
from silo.sync.traffic import Traffic

__all__ = ["StoreReader"]

T = TypeVar("T")


class StoreReader:
    """See the module. Concurrent calls are what it is for."""

    def __init__(
        self,
        store: ObjectStore,
        clock: Clock,
        settings: FetchSettings | None = None,
        *,
        keys: KeyRing | None = None,
    ) -> None:
        self.keys = keys
        """The master keys of an encrypted group."""
        self.settings = settings or FetchSettings()
        self.traffic = Traffic()
        """Lets requests of the background, here and elsewhere, give way to those that guests wait for."""
        self.bytes_read = 0
        self._background = asyncio.Semaphore(self.settings.background_lanes)
        self._demand = asyncio.Semaphore(self.settings.demand_lanes)
        self._store = store
        self._clock = clock

    async def read(self, key: str, offset: int, length: int, *, demand: bool) -> Buffer | None:
        """Exactly these bytes of an object, unverified; ``None`` when there is no such object.

        `UnavailableError` when the store does not answer: at once in the background, after ``patience_s`` on
        demand. `CorruptionError` when the object is shorter. Cancellation leaves nothing behind.
        """
        if not demand:
            async with self._background:
                return await self.read_behind(key, offset, length)
        return await self.patiently(lambda: self.read_now(key, offset, length))

    def unseal(self, data: Buffer, part: PartRef) -> tuple[Buffer, bytes]:
        """What was read of a part, decrypted if need be, and the digest that this must have. `CorruptionError` when it
        cannot be decrypted."""
        digest = bytes.fromhex(part.digest)
        if self.keys is None:
            return data, digest
        if digest_of(data) != digest:
            raise CorruptionError(f"a part of {part.key} does not have its digest")
        opened = self.keys.open_part(data, part.key, part.offset)
        return opened, digest_of(opened)

    async def read_object(self, key: str) -> Buffer | None:
        """The whole of an object, on demand; ``None`` when there is none. Raises as `read`."""
        found = await self.patiently(
            lambda: bounded(lambda: self._store.get(key), self.settings.retry.request_timeout_s)
        )
        return None if found is None else found.data

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a request in a demand lane, again and again until the store answers or ``patience_s`` is over."""
        give_up = self._clock.monotonic() + self.settings.patience_s
        backoff = Backoff(self._clock, self.settings.retry)
        while True:
            try:
                async with self._demand:
                    with self.traffic.demand():
                        return await call()
            except UnavailableError as error:
                delay = backoff.failed(error)
                if self._clock.monotonic() + delay > give_up:
                    raise
                await asyncio.sleep(delay)

    async def read_behind(self, key: str, offset: int, length: int) -> Buffer | None:
        """As `read_now`, after those that guests wait for, as far as the background can wait."""
        await self.traffic.give_way()
        return await self.read_now(key, offset, length)

    async def read_now(self, key: str, offset: int, length: int) -> Buffer | None:
        """One request, in no lane. As `read` otherwise."""
        try:
            found = await bounded(
                lambda: self._store.get(key, start=offset, length=length),
                self.settings.retry.request_timeout_s,
            )
        except InvalidRequestError:
            raise CorruptionError(f"{key} is shorter than what refers to it") from None
        if found is None:
            return None
        if len(found.data) != length:
            raise CorruptionError(f"{key} is shorter than what refers to it")
        self.bytes_read += length
        return found.data
