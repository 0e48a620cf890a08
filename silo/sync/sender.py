"""Sending immutable objects: a bounded window, a limit on the rate, and as many attempts as it takes.

An object that is about to be sent gives way to guests that wait for a chunk (`silo.sync.traffic`).

Every object is created under a key of its own and only if the key is free, so an attempt whose outcome is not known
is simply repeated: when the key is taken, and by the very bytes that were to be sent, an earlier attempt got
through after all. Sequence numbers are never used again, not even after a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from silo.abc import Buffer, Clock, ObjectStore
from silo.errors import InvariantError, UnavailableError
from silo.sync.cipher import SALT_SIZE, KeyRing, Sealer
from silo.sync.claim import Owner
from silo.sync.layout import SegmentName
from silo.sync.planner import TokenBucket, UploadWindow
from silo.sync.retry import STORE_TROUBLE, Backoff, Trouble, bounded
from silo.sync.settings import SyncSettings
from silo.sync.traffic import Traffic

__all__ = ["ObjectSender"]

TAIL = 64
"""The last bytes of a segment hold the digest of its index; equal tails of equal objects are enough to tell."""

SLOWEST_BPS = 256 * 1024
"""A request may take this much longer per byte than its fixed limit: 128 s for a segment of 32 MiB."""


class ObjectSender:
    """See the module. Concurrent calls share the window."""

    def __init__(
        self,
        store: ObjectStore,
        group: str,
        settings: SyncSettings,
        clock: Clock,
        traffic: Traffic | None = None,
    ) -> None:
        self.window = UploadWindow(settings.segment_size, settings.window)
        self.trouble: Trouble | None = None
        """Why objects are being sent again."""
        self.sent_bytes = 0
        self.sent_objects = 0
        self.in_flight: set[str] = set()
        """Keys that were handed out and whose objects are still being sent."""
        self._store = store
        self._group = group
        self._settings = settings
        self._clock = clock
        self._traffic = traffic or Traffic()
        self._bucket = TokenBucket(settings.rate_bps)
        self._owner: Owner | None = None
        self._seq = 0
        self._room = asyncio.Event()

    def name(self, owner: Owner) -> SegmentName:
        """A key that was never used."""
        if owner != self._owner:
            self._owner, self._seq = owner, 0
        self._seq += 1
        name = SegmentName(self._group, owner.epoch, self._seq, owner.incarnation)
        self.in_flight.add(name.key)
        return name

    def sealer(self, name: SegmentName, keys: KeyRing | None) -> Sealer | None:
        """What encrypts an object that was named and is not made yet; ``None`` without keys."""
        return keys.sealer(name.key, self._clock.token(SALT_SIZE)) if keys is not None else None

    async def enter(self, size: int) -> None:
        """Wait until ``size`` bytes may be sent, and count them as being sent. The caller must `leave` afterwards.

        Waits as long as uploads take; whoever sends them decides how long that may be.
        """
        while not self.window.fits(size):
            self._room.clear()
            await self._room.wait()
        self.window.enter(size)

    def leave(self, size: int) -> None:
        """These bytes are not being sent any more, for whatever reason."""
        self.window.leave(size)
        self._room.set()

    async def send(
        self,
        name: SegmentName,
        buffers: Sequence[Buffer],
        size: int,
        check: Callable[[], None] | None = None,
    ) -> int:
        """Create the object. Tried again until it is stored, or until ``check``, called before each attempt, raises.

        Returns how many attempts it took; after the first one nothing reads the buffers any more, after others
        a request that was given up still may.

        `InvariantError` when the key holds something else. After a cancellation the object may exist or come to
        exist; nothing refers to it.
        """
        try:
            return await self._send(name, buffers, size, check)
        finally:
            self.in_flight.discard(name.key)

    async def _send(
        self, name: SegmentName, buffers: Sequence[Buffer], size: int, check: Callable[[], None] | None
    ) -> int:
        backoff = Backoff(self._clock, self._settings.retry)
        attempts = 0
        await asyncio.sleep(self._bucket.delay(self._clock.monotonic(), size))
        while True:
            if check is not None:
                check()
            attempts += 1
            await self._traffic.give_way()
            started = self._clock.monotonic()
            try:
                await self._create(name, buffers, size)
            except STORE_TROUBLE as error:
                self.window.failed()
                delay = backoff.failed(error)
                self.trouble = backoff.trouble
                await asyncio.sleep(delay)
                continue
            self.window.succeeded(size, self._clock.monotonic() - started)
            self.trouble = None
            self.sent_bytes += size
            self.sent_objects += 1
            return attempts

    async def _create(self, name: SegmentName, buffers: Sequence[Buffer], size: int) -> None:
        timeout_s = self._settings.retry.request_timeout_s
        limit_s = timeout_s + size / SLOWEST_BPS
        created = await bounded(lambda: self._store.put_if(name.key, buffers, match=None), limit_s)
        if created is not None:
            return
        tail = _tail(buffers)
        found = await bounded(
            lambda: self._store.get(name.key, start=size - len(tail), length=len(tail)), timeout_s
        )
        if found is None:
            raise UnavailableError(f"{name.key} exists and does not")
        if found.size != size or bytes(found.data) != tail:
            raise InvariantError(f"{name.key} is taken by something else")


def _tail(buffers: Sequence[Buffer]) -> bytes:
    """The last `TAIL` bytes of all."""
    tail = b""
    for buffer in reversed(buffers):
        tail = bytes(buffer[max(0, len(buffer) - TAIL + len(tail)) :]) + tail
        if len(tail) >= TAIL:
            break
    return tail
