"""Counting the requests to a store, verb by verb: what an operator pays for.

A layer over any `silo.abc.ObjectStore` that adds nothing else. A listing counts as one request, however many pages
it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence

from silo.abc import Buffer, ObjectInfo, ObjectStore, StoredObject

__all__ = ["CountedStore"]


class CountedStore(ObjectStore):
    """See the module. ``requests`` grows when a request sets out, whatever becomes of it."""

    def __init__(self, inner: ObjectStore) -> None:
        self.url = inner.url
        self.requests: Counter[str] = Counter()
        self.out_bytes = 0
        """Content that came back."""
        self._inner = inner

    async def put(self, key: str, data: Sequence[Buffer]) -> str:
        self.requests["put"] += 1
        return await self._inner.put(key, data)

    async def put_if(self, key: str, data: Sequence[Buffer], *, match: str | None) -> str | None:
        self.requests["put"] += 1
        return await self._inner.put_if(key, data, match=match)

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        self.requests["get"] += 1
        found = await self._inner.get(key, start=start, length=length)
        self.out_bytes += 0 if found is None else len(found.data)
        return found

    async def head(self, key: str) -> ObjectInfo | None:
        self.requests["head"] += 1
        return await self._inner.head(key)

    async def delete(self, keys: Sequence[str]) -> None:
        self.requests["delete"] += 1
        await self._inner.delete(keys)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        self.requests["list"] += 1
        async for info in self._inner.list(prefix):
            yield info

    async def aclose(self) -> None:
        await self._inner.aclose()
