"""The kit that holds stores to the port's contract: it must catch whoever breaks a sentence of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import attrs
import pytest

from silo.abc import Buffer, ObjectInfo, StoredObject
from silo.clock import SystemClock
from silo.errors import InvalidRequestError, UnavailableError
from silo.sync.memory_client import MemoryClient
from silo.sync.memory_store import MemoryStore
from silo.testing.check_store import check_store

Data = Sequence[Buffer]


class Impostor(MemoryClient):
    """A store that would pass; each one below breaks one sentence."""


class TakesAnyKey(Impostor):
    async def head(self, key: str) -> ObjectInfo | None:
        with contextlib.suppress(InvalidRequestError):
            return await super().head(key)
        return None


class PutsThePassword(Impostor):
    def __init__(self, store: MemoryStore, name: str) -> None:
        super().__init__(store, name)
        self.url = "s3://key:secret@bucket"


class ForgetsABuffer(Impostor):
    async def put(self, key: str, data: Data) -> str:
        return await super().put(key, data[:100])


class KeepsTheBuffers(Impostor):
    async def put(self, key: str, data: Data) -> str:
        etag = await super().put(key, data)
        if len(data) == 1 and len(data[0]) == 50_000:
            self.store.views = getattr(self.store, "views", {}) | {key: data[0]}  # type: ignore[attr-defined]
        return etag

    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        found = await super().get(key, start=start, length=length)
        kept = getattr(self.store, "views", {}).get(key)
        return (
            found
            if kept is None or found is None or start
            else attrs.evolve(found, data=bytes(kept)[:length])
        )


class FindsEmptiness(Impostor):
    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        if "nowhere" in key:
            return StoredObject(b"", "none", 0)
        return await super().get(key, start=start, length=length)


class DeletesOnlyWhatIsThere(Impostor):
    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            if await self.head(key) is None:
                raise UnavailableError("404")
        await super().delete(keys)


class ReadsToTheEnd(Impostor):
    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        return await super().get(key, start=start)


class ReadsNothingPastTheEnd(Impostor):
    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        found = await super().head(key)
        if found is not None and start >= found.size and (start or length):
            return StoredObject(b"", found.etag, found.size)
        return await super().get(key, start=start, length=length)


class ReadsLiveMemory(Impostor):
    async def get(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject | None:
        found = await super().get(key, start=start, length=length)
        if found is None or length != 99_000:
            return found
        live = bytearray(found.data)
        self.store.on_mutation.append(lambda _: live.__setitem__(0, (live[0] + 1) % 256))
        return attrs.evolve(found, data=memoryview(live))


class QuotesEtagsSometimes(Impostor):
    async def head(self, key: str) -> ObjectInfo | None:
        found = await super().head(key)
        return found and attrs.evolve(found, etag=f'"{found.etag}"')


class CreatesTwice(Impostor):
    async def put_if(self, key: str, data: Data, *, match: str | None) -> str | None:
        return await (self.put(key, data) if match is None else super().put_if(key, data, match=match))


class MatchesAnything(Impostor):
    async def put_if(self, key: str, data: Data, *, match: str | None) -> str | None:
        if match is not None and await self.head(key) is not None:
            return await self.put(key, data)
        return await super().put_if(key, data, match=match)


class ResurrectsWhatIsGone(Impostor):
    async def put_if(self, key: str, data: Data, *, match: str | None) -> str | None:
        if match is not None and await self.head(key) is None:
            return await self.put(key, data)
        return await super().put_if(key, data, match=match)


class ComparesAndThenSwaps(Impostor):
    """The classic: reads, compares, gives others a chance, writes."""

    async def put_if(self, key: str, data: Data, *, match: str | None) -> str | None:
        found = await self.head(key)
        if (found.etag if found else None) != match:
            return None
        await asyncio.sleep(0)
        return await self.put(key, data)


class ComparesAndThenSwapsOnlyWhenReplacing(ComparesAndThenSwaps):
    async def put_if(self, key: str, data: Data, *, match: str | None) -> str | None:
        if match is None:
            return await MemoryClient.put_if(self, key, data, match=None)
        return await super().put_if(key, data, match=match)


class DeletesByPrefix(Impostor):
    async def delete(self, keys: Sequence[str]) -> None:
        more = [key for key in self.store.snapshot() if any(key.startswith(f"{named}.") for named in keys)]
        await super().delete([*keys, *more])


class ListsInAnyOrder(Impostor):
    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        for info in reversed([info async for info in super().list(prefix)]):
            yield info


class ListsDirectories(Impostor):
    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        async for info in super().list(prefix):
            if info.key.removeprefix(prefix).startswith("/") or prefix.endswith("/") or info.key == prefix:
                yield info


class ListsOnePage(Impostor):
    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        count = 0
        async for info in super().list(prefix):
            count += 1
            if count <= 20:
                yield info


class LosesWhatLiesBelow(Impostor):
    async def put(self, key: str, data: Data) -> str:
        await self.delete([other for other in self.store.snapshot() if other.startswith(f"{key}/")])
        return await super().put(key, data)


class CutsBigObjects(Impostor):
    async def put_if(self, key: str, data: Data, *, match: str | None) -> str | None:
        return await super().put_if(key, [b"".join(data)[: 4 << 20]], match=match)


class WritesInTwoSteps(Impostor):
    async def put(self, key: str, data: Data) -> str:
        body = b"".join(data)
        if len(body) > 100_000 and await self.head(key) is not None:
            await super().put(key, [body[:50_000]])
            await asyncio.sleep(0)
        return await super().put(key, data)


class LeavesHalfWhenCancelled(Impostor):
    async def put_if(self, key: str, data: Data, *, match: str | None) -> str | None:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.store.place(key, bytes(data[0]))
            raise
        return await super().put_if(key, data, match=match)


class NeverCloses(Impostor):
    async def aclose(self) -> None:
        pass


class ClosesOnce(Impostor):
    async def aclose(self) -> None:
        if self._closed:
            raise UnavailableError("closed already")
        await super().aclose()


IMPOSTORS = {
    TakesAnyKey: "_check_keys",
    PutsThePassword: "_check_url",
    ForgetsABuffer: "_check_put_and_get",
    KeepsTheBuffers: "_check_put_keeps_no_buffer",
    FindsEmptiness: "_check_absent",
    DeletesOnlyWhatIsThere: "_check_delete",
    ReadsToTheEnd: "_check_ranges",
    ReadsNothingPastTheEnd: "_check_wrong_ranges",
    ReadsLiveMemory: "_check_result_is_stable",
    QuotesEtagsSometimes: "_check_etags",
    CreatesTwice: "_check_create",
    MatchesAnything: "_check_replace",
    ResurrectsWhatIsGone: "_check_replace_needs_the_object",
    ComparesAndThenSwaps: "_check_race_to_create",
    ComparesAndThenSwapsOnlyWhenReplacing: "_check_race_to_replace",
    DeletesByPrefix: "_check_delete",
    ListsInAnyOrder: "_check_delete",
    ListsDirectories: "_check_list",
    ListsOnePage: "_check_list",
    LosesWhatLiesBelow: "_check_key_below_key",
    CutsBigObjects: "_check_big",
    WritesInTwoSteps: "_check_readers_see_whole_objects",
    LeavesHalfWhenCancelled: "_check_cancelled_put",
    NeverCloses: "_check_closed",
    ClosesOnce: "_check_closed",
}


@pytest.mark.parametrize("kind", IMPOSTORS, ids=lambda kind: kind.__name__)
async def test_impostors_are_caught(clock: SystemClock, kind: type[Impostor]) -> None:
    store = MemoryStore(clock)

    async def make() -> Impostor:
        return kind(store, "impostor")

    with pytest.raises(AssertionError) as caught:
        await check_store(make, writers=4, rounds=3)
    assert caught.value.__notes__[0].startswith(f"{IMPOSTORS[kind]}: ")


async def test_what_would_pass_passes(clock: SystemClock) -> None:
    store = MemoryStore(clock)
    store.place("vm/head", b"not ours")

    async def make() -> Impostor:
        return Impostor(store, "honest")

    await check_store(make, writers=2, rounds=2, big=100_000)
    assert store.snapshot() == {"vm/head": b"not ours"}
