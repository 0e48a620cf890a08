"""Acting on a group that nobody serves: its last owner stored everything and let go.

Then anybody may replace the head by one that says the same of the content, with a compare-and-swap against the very
head that was looked at. Who claims the group at the same time wins, or builds on what was written; a collector's
floor holds either way, because it is in the head that every later one follows from.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from silo.abc import Clock, ObjectStore
from silo.errors import FencedError, InvalidRequestError, UnavailableError
from silo.sync.claim import owner_of
from silo.sync.collection import Horizon
from silo.sync.head import Head, WriterState, encode_head, parse_head
from silo.sync.layout import head_key
from silo.sync.manifest import Manifest
from silo.sync.reader import StoreReader
from silo.sync.retry import bounded

__all__ = ["ReleasedAuthority", "change_released"]


async def change_released(
    store: ObjectStore, reader: StoreReader, clock: Clock, head: Head, change: Callable[[Head], Head]
) -> Head:
    """Replace exactly this head, of a group that was released, by a changed one. The owner stays who it was.

    `FencedError` when the head is another one by now.
    """
    timeout_s = reader.settings.retry.request_timeout_s
    key = head_key(head.group)
    following = msgspec.structs.replace(change(head), nonce=clock.token(16).hex())
    found = await reader.patiently(lambda: bounded(lambda: store.get(key), timeout_s))
    if found is None or parse_head(found.data, head.group).nonce != head.nonce:
        raise FencedError(f"group {head.group} was opened, or changed, at the same time", hint="try again")
    body = encode_head(following)
    try:
        etag = await bounded(lambda: store.put_if(key, [body], match=found.etag), timeout_s)
    except UnavailableError:
        etag = None
    if etag is None:
        data = await reader.read_object(key)
        if data is None or parse_head(data, head.group).nonce != following.nonce:
            raise FencedError(
                f"group {head.group} was opened, or changed, at the same time", hint="try again"
            )
    return following


class ReleasedAuthority:
    """A collector's authority over a group that nobody serves: see `silo.sync.collector.Authority`."""

    def __init__(self, store: ObjectStore, reader: StoreReader, clock: Clock, manifest: Manifest) -> None:
        if manifest.head.state is not WriterState.RELEASED:
            raise InvalidRequestError(
                f"group {manifest.head.group} is served by a host, or its host died",
                hint="ask the daemon that serves it (without --store), or open it somewhere first",
            )
        self.manifest = manifest
        self._store = store
        self._reader = reader
        self._clock = clock

    def may_delete(self) -> bool:
        """Whoever reads without a record reads this very generation."""
        return True

    def horizon(self) -> Horizon:
        """As of the head."""
        head = self.manifest.head
        return Horizon(head.group, owner_of(head), head.seq)

    async def raise_floor(self, floor: int, needless_parents: frozenset[str]) -> Head:
        """At once. Raises as `change_released`."""

        def change(head: Head) -> Head:
            parents = tuple(parent for parent in head.parents if parent not in needless_parents)
            return msgspec.structs.replace(head, gc_floor=max(head.gc_floor, floor), parents=parents)

        head = self.manifest.head
        self.manifest.head = await change_released(self._store, self._reader, self._clock, head, change)
        return self.manifest.head

    async def rewrite(self, keys: frozenset[str]) -> int:
        """Nothing is written."""
        return 0

    def want_checkpoint(self) -> None:
        """Nor this."""
